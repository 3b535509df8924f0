// What a program depends on besides the values of its arguments.

#pragma once

#include <array>
#include <cstdlib>
#include <cstring>
#include <vector>

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/DefaultDtype.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "objects.h"

namespace at::autocast {
ScalarType get_autocast_dtype(DeviceType device);
}

namespace {

struct Form {  // of a tensor: what a program is specialised to
    std::vector<int64_t> sizes, strides;
    caffe2::TypeMeta dtype;
    c10::Device device;
    c10::DispatchKeySet keys;

    explicit Form(TensorImpl* x)
        : sizes(x->sizes().vec()), strides(x->strides().vec()), dtype(x->dtype()),
          device(x->device()), keys(x->key_set()) {}

    bool fits(TensorImpl* x) const {
        return x->key_set() == keys && x->dtype() == dtype && x->device() == device &&
            x->sizes() == c10::IntArrayRef(sizes) && x->strides() == c10::IntArrayRef(strides) &&
            !x->requires_grad();
    }
};

// The state of torch that programs depend on: SETTINGS of `_settings.py`, without the default
// device. Autocast, inference mode, transformations and modes that intercept operations are keys.
struct Ambient {
    c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
    std::array<int, 19> values;

    Ambient() {
        auto& context = at::globalContext();
        auto dtype = [](c10::DeviceType device) {
            return int(at::autocast::get_autocast_dtype(device));
        };
        auto precision = [&](at::Float32Backend backend, at::Float32Op op) {
            return int(context.float32Precision(backend, op));
        };
        values = {
            dtype(c10::DeviceType::CPU),
            dtype(c10::DeviceType::CUDA),
            dtype(c10::DeviceType::XPU),
            dtype(c10::DeviceType::MPS),
            int(c10::get_default_dtype_as_scalartype()),
            c10::GradMode::is_enabled(),
            at::get_num_threads(),
            context.deterministicAlgorithms(),
            context.deterministicAlgorithmsWarnOnly(),
            precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL),
            precision(at::Float32Backend::CUDA, at::Float32Op::CONV),
            precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL),
            context.userEnabledMkldnn(),
            context.userEnabledCuDNN(),
            context.deterministicCuDNN(),
            context.userEnabledMathSDP(),
            context.userEnabledFlashSDP(),
            context.userEnabledMemEfficientSDP(),
            context.userEnabledCuDNNSDP(),
        };
    }

    bool operator==(const Ambient& other) const {
        return keys.included_ == other.keys.included_ && keys.excluded_ == other.keys.excluded_ &&
            values == other.values;
    }
};

bool is_set(PyObject* context_variable) {
    PyObject* value = nullptr;
    if (PyContextVar_Get(context_variable, nullptr, &value)) throw Failed();
    Object held(value);
    if (!value || value == Py_None) return false;
    int truth = PyObject_IsTrue(value);
    if (truth < 0) throw Failed();
    return truth;
}

bool runs_inline() {
    const char* environment = std::getenv("FDL_JIT");
    if (environment && !std::strcmp(environment, "0")) return true;
    if (is_set(python.disabled) || is_set(python.watching) || is_set(python.tracing)) return true;
    PyObject* level = PyDict_GetItemString(python.forward_ad, "_current_level");
    if (!level || PyLong_AsLong(level) >= 0) return true;
    Object transform(checked(PyObject_CallNoArgs(python.peek_transform)));
    if (transform.ptr != Py_None) return true;
    if (!at::impl::PythonTorchFunctionTLS::stack_len()) return false;
    Object mode(checked(PyObject_CallNoArgs(python.has_mode)));
    return mode.ptr != Py_False;
}

// Check the default device, which a mode of torch.overrides sets.
bool is_default_device(PyObject* device) {
    if (!at::impl::PythonTorchFunctionTLS::stack_len()) return device == Py_None;
    Object now(checked(PyObject_CallNoArgs(python.default_device)));
    int equal = PyObject_RichCompareBool(now.ptr, device, Py_EQ);
    if (equal < 0) throw Failed();
    return equal;
}

// Check that nobody else can see the memory of a tensor of which this file holds one reference, and
// that torch allocated it in the same way as that of `plain`.
bool is_alone(TensorImpl* impl, TensorImpl* plain) {
    if (!impl->has_storage() || c10::raw::intrusive_ptr::use_count(impl) != 2) return false;
    const c10::Storage& storage = impl->storage();
    auto* memory = storage.unsafeGetStorageImpl();
    PyObject* object = memory->pyobj_slot()->load_pyobj();  // once somebody asked for it
    size_t holders = object ? 2 : 1;
    return storage.use_count() == holders && (!object || Py_REFCNT(object) == 1) &&
        memory->resizable() &&
        storage.data_ptr().get_deleter() == plain->storage().data_ptr().get_deleter() &&
        storage.nbytes() == static_cast<size_t>(impl->numel()) * impl->itemsize() &&
        impl->is_non_overlapping_and_dense();
}

}  // namespace
