"""AbhiAPI: a transparent, prepaid proxy in front of fal.ai."""

__version__ = "0.1.0"
