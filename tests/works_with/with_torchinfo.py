"""A table of layers, shapes and numbers of parameters."""

from torchinfo import summary

from fdl import interop, nn, random, tree

model = nn.sequential(nn.linear(4, 8), nn.tanh, nn.linear(8, 3))
params = model.init(random.key(0))

# Recipe
table = summary(interop.to_sequential(model, params), input_size=(32, 4), verbose=0)
print(table)

# Check
assert table.total_params == tree.size(params)
assert len(table.summary_list) == 4  # the whole and its three layers
