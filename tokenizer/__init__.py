"""Pictures, video and text as integer codes."""

from tokenizer.streaming import StreamDecoder, StreamEncoder
from tokenizer.text import TextTokenizer
from tokenizer.video import VideoTokenizer, VideoTokenizerConfig

__all__ = ["StreamDecoder", "StreamEncoder", "TextTokenizer", "VideoTokenizer", "VideoTokenizerConfig"]
