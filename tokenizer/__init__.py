"""Tokenizers that turn pictures, video and text into integers and back."""

from tokenizer.streaming import StreamDecoder, StreamEncoder
from tokenizer.text import TextTokenizer
from tokenizer.video import VideoTokenizer, VideoTokenizerConfig

__all__ = ["StreamDecoder", "StreamEncoder", "TextTokenizer", "VideoTokenizer", "VideoTokenizerConfig"]
