"""What is right at the gateway, decidable on paper: commands, frames, events as JSON, and who sees which event."""
