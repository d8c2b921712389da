"""Networks: weights in, arrays out. They know no rows, requests or samplers."""
