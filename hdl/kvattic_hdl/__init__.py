"""The Amaranth RTL of kvattic: one lane for each flash channel, and what joins them."""
