"""What writes parts of the documentation: its pictures and the list of who may import whom."""
