"""Gymnasium environments; `import llmserve_env` registers their ids."""
