"""The commands of `llmserve`, one module each."""
