"""A table of layers and sizes, of the module that `to_sequential` builds."""

from torchinfo import summary

from fdl import interop, nn, random, tree

model = nn.sequential(nn.linear(4, 8), nn.tanh, nn.linear(8, 3))
params = model.init(random.key(0))

# Recipe
table = summary(interop.as_module(model, params), input_size=(32, 4), verbose=0)
print(table)

# Check
assert table.total_params == tree.size(params)
