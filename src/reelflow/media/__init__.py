"""Video and picture files: `read` brings them in, `write` takes them out, `comment` is what they say about how they were made."""
