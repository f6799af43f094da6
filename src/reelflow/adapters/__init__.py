"""The border to other people's formats: video codecs, text encoders, checkpoints."""
