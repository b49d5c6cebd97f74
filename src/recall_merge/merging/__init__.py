"""One merge: run, rules, plan, samples, weights, tensors, checks, record."""
