"""How do the keys reach the queries?  The choice must not change the answer."""
