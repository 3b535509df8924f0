// Train LeNet without Python, from the files of docs/examples/lenet_export.py.
//
//     TORCH=$(python -c 'import torch; print(torch.__path__[0])')
//     g++ -std=c++20 -O1 -I $TORCH/include docs/examples/lenet_train.cpp -o lenet_train \
//         -L $TORCH/lib -Wl,-rpath,$TORCH/lib,--no-as-needed -ltorch -ltorch_cpu -lc10
//     ./lenet_train FOLDER EPOCHS
//
// It writes the state to FOLDER/state.pt, which torch.load reads: the tensors in the order of
// fdl.tree.leaves.

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

using Program = torch::inductor::AOTIModelPackageLoader;
using Tensors = std::vector<at::Tensor>;

// The bytes of a file.
at::Tensor read(const std::string& path) {
    const auto size = static_cast<int64_t>(std::filesystem::file_size(path));
    return at::from_file(path, /*shared=*/false, size, at::TensorOptions().dtype(at::kByte));
}

int main(int argc, char** argv) {
    if (argc != 3) {
        std::cerr << "usage: lenet_train FOLDER EPOCHS\n";
        return 1;
    }
    setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", /*overwrite=*/0);  // raise for other shapes and dtypes
    const std::string folder = argv[1];
    const int epochs = std::stoi(argv[2]);

    Program init(folder + "/init.pt2"), epoch(folder + "/epoch.pt2");
    const at::Tensor images = read(folder + "/images").view({-1, 28, 28});
    const at::Tensor labels = read(folder + "/labels");
    const at::Tensor key = at::zeros({2}, at::kLong);  // fdl.random.key(0)

    // A program takes and returns the leaves of its trees: the state is a list of tensors.
    Tensors state = init.run({key});
    for (int i = 1; i <= epochs; ++i) {
        Tensors inputs = state;
        inputs.push_back(images);
        inputs.push_back(labels);
        Tensors results = epoch.run(inputs);  // the new state, loss, accuracy
        const double accuracy = results.back().item<double>();
        results.pop_back();
        const double loss = results.back().item<double>();
        results.pop_back();
        state = std::move(results);
        std::cout << "epoch " << i << ": loss " << loss << ", accuracy " << accuracy << std::endl;
    }

    const auto leaves = c10::ivalue::Tuple::create({state.begin(), state.end()});
    const std::vector<char> bytes = torch::jit::pickle_save(leaves);
    std::ofstream(folder + "/state.pt", std::ios::binary).write(bytes.data(), bytes.size());
}
