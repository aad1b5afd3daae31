"""Models: what embeds, what summarizes, what counts tokens. Each file imports one library, and nothing imports all."""
