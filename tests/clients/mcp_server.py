"""An MCP server with one tool, over standard input and output."""

from typing import Annotated

from mcp.server.mcpserver import MCPServer
from pydantic import Field

server = MCPServer("sums")


@server.tool()
def add(a: Annotated[int, Field(ge=0, le=99)], b: Annotated[int, Field(ge=0, le=99)]) -> str:
    """The sum of two numbers."""
    return f"{a} + {b} = {a + b}"


if __name__ == "__main__":
    server.run()
