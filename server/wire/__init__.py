"""The service over HTTP, WebSocket and MCP."""
