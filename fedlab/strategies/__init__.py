"""How a server combines updates, and what that changes at the sites."""
