"""When and where it runs: requests, tenants, batches, streams. No model maths."""
