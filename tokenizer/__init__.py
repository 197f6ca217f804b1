"""Pictures, video and text as integer codes."""

from tokenizer.text import TextTokenizer
from tokenizer.video import VideoTokenizer, VideoTokenizerConfig

__all__ = ["TextTokenizer", "VideoTokenizer", "VideoTokenizerConfig"]
