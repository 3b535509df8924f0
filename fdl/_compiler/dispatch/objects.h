// Objects of Python and tensors of torch.

#pragma once

#include <Python.h>

#include <utility>
#include <vector>

#include <ATen/core/TensorBase.h>

PyObject* THPVariable_Wrap(at::TensorBase&& tensor);  // of torch_python

namespace {

using c10::TensorImpl;
using Impl = c10::intrusive_ptr<TensorImpl, c10::UndefinedTensorImpl>;
struct Object {  // an owned reference
    PyObject* ptr = nullptr;
    Object() = default;
    explicit Object(PyObject* ptr) : ptr(ptr) {}
    Object(Object&& other) noexcept : ptr(other.ptr) { other.ptr = nullptr; }
    Object(const Object&) = delete;
    Object& operator=(Object&& other) noexcept {
        std::swap(ptr, other.ptr);
        return *this;
    }
    ~Object() { Py_XDECREF(ptr); }
    PyObject* release() {
        PyObject* released = ptr;
        ptr = nullptr;
        return released;
    }
};

Object owned(PyObject* borrowed) {
    Py_XINCREF(borrowed);
    return Object(borrowed);
}

struct Failed {};  // a Python error is set

PyObject* checked(PyObject* value) {
    if (!value) throw Failed();
    return value;
}

// What `install` was given: classes and functions of Python.
struct {
    PyObject *tensor, *parameter, *donated;                             // classes
    PyObject *disabled, *watching, *tracing;                            // ContextVars
    PyObject *default_device, *peek_transform, *has_mode, *unflatten;   // functions
    PyObject *forward_ad;                                               // dict of a module
    PyObject* intact;                                                   // name of an attribute
} python;

TensorImpl* impl_of(PyObject* tensor) {
    // The layout of THPVariable; `install` checks it.
    return *reinterpret_cast<TensorImpl**>(reinterpret_cast<char*>(tensor) + sizeof(PyObject));
}

bool is_tensor(PyObject* x) {
    PyObject* kind = reinterpret_cast<PyObject*>(Py_TYPE(x));
    return kind == python.tensor || kind == python.parameter;
}

Impl share(TensorImpl* impl) {
    return Impl::reclaim_copy(impl);
}

Impl detach(TensorImpl* impl) {
    return impl->shallow_copy_and_detach(c10::VariableVersion(0), true);
}

PyObject* wrap(Impl impl) {
    return checked(THPVariable_Wrap(at::TensorBase(std::move(impl))));
}

// Read numbers of a list.
std::vector<size_t> numbers(PyObject* list) {
    std::vector<size_t> read;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
        read.push_back(PyLong_AsSize_t(PyList_GET_ITEM(list, i)));
    }
    if (PyErr_Occurred()) throw Failed();
    return read;
}

}  // namespace
