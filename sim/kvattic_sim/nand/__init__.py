"""NAND dies: their files, a behavioural twin in Python, a timeline of what they did."""
