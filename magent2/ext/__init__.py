"""Optional pieces, a folder each. The core imports none of them, and they never import each other."""
