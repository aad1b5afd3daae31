"""What the memory costs, measured side by side with what it replaces; the command `bench` shows it."""
