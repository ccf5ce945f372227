"""The HTTP surface of omni models: chat, speech, transcriptions."""
