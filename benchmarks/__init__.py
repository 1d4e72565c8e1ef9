"""Questions of speed and equality, one file each: `vbert bench NAME`. Nothing here is imported by the product."""
