"""Lower plans to FlexAttention where a compiler exists."""
