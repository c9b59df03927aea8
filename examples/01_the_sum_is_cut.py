"""A sum can be cut anywhere: attention over ten keys, in one piece and in three."""

import torch

from shardsum import AttentionState, merge

torch.manual_seed(0)
scores = torch.randn(10)  # one query's scores against ten keys
values = torch.randn(10, 4)


def over(keys: slice) -> AttentionState:
    """The attention over some of the keys: their values' weighted sum, and the log of the sum of weights."""
    return AttentionState(scores[keys].softmax(0) @ values[keys], scores[keys].logsumexp(0))


whole = over(slice(0, 10))
parts = [over(slice(0, 3)), over(slice(3, 4)), over(slice(4, 10))]
merged = merge(merge(parts[0], parts[1]), parts[2])
swapped = merge(parts[2], merge(parts[0], parts[1]))

print("equal to the whole:", torch.allclose(merged.out, whole.out, atol=1e-6))
print("in any order, to the bit:", torch.equal(merged.out, swapped.out))
print(
    "an average of the parts would be wrong by",
    round(float((sum(p.out for p in parts) / 3 - whole.out).norm()), 2),
)

# Output:
# equal to the whole: True
# in any order, to the bit: True
# an average of the parts would be wrong by 0.52
