"""What end-to-end tests and benchmarks share: a real server, small real models, a witness that trusts nobody."""
