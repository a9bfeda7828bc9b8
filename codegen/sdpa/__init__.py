"""Lower plans to scaled_dot_product_attention."""
