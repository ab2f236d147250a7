"""LLMServe over HTTP, WebSocket, MCP and a web page, for OpenEnv."""
