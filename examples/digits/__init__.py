"""The handwritten digits, and small networks trained on them."""
