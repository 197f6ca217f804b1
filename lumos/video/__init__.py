"""Reading and writing of video and picture files, frames as arrays, and contact sheets."""
