"""What several blocks use: shapes and signatures, AXI, arithmetic."""
