"""From a dense FFN to shared and routed experts, without training: recipes, assignment, gates."""
