// Trees, and their structures as `_signature.py` describes them: nested tuples.

#pragma once

#include <vector>

#include "objects.h"

namespace {

Py_ssize_t children(PyObject* spec) {
    return PyTuple_GET_SIZE(spec) - 2;
}

bool is_namedtuple(PyObject* kind) {
    return PyType_Check(kind) &&
        PyType_IsSubtype(reinterpret_cast<PyTypeObject*>(kind), &PyTuple_Type);
}

// Check for a structure of dicts, lists, tuples, named tuples, None and leaves.
bool is_simple(PyObject* spec) {
    if (spec == Py_None) return true;
    if (!PyTuple_CheckExact(spec) || PyTuple_GET_SIZE(spec) < 2) return false;
    PyObject* kind = PyTuple_GET_ITEM(spec, 0);
    if (kind == reinterpret_cast<PyObject*>(Py_TYPE(Py_None))) return true;
    if (kind != reinterpret_cast<PyObject*>(&PyDict_Type) &&
        kind != reinterpret_cast<PyObject*>(&PyList_Type) && !is_namedtuple(kind)) {
        return false;
    }
    for (Py_ssize_t i = 0; i < children(spec); ++i) {
        if (!is_simple(PyTuple_GET_ITEM(spec, i + 2))) return false;
    }
    return true;
}

// Append the leaves of a tree, or return false if it has another structure.
bool flatten(PyObject* tree, PyObject* spec, std::vector<PyObject*>& leaves) {
    if (spec == Py_None) {
        if (!is_tensor(tree)) return false;
        leaves.push_back(tree);
        return true;
    }
    PyObject* kind = PyTuple_GET_ITEM(spec, 0);
    if (reinterpret_cast<PyObject*>(Py_TYPE(tree)) != kind) return false;
    if (tree == Py_None) return true;
    if (PyDict_CheckExact(tree)) {
        PyObject* keys = PyTuple_GET_ITEM(spec, 1);
        if (PyDict_GET_SIZE(tree) != children(spec)) return false;
        Py_ssize_t position = 0;
        PyObject *key, *value;
        for (Py_ssize_t i = 0; i < children(spec); ++i) {
            PyObject* expected = PyTuple_GET_ITEM(keys, i);
            if (!PyDict_Next(tree, &position, &key, &value)) return false;
            if (key != expected) {  // mostly it is the same object
                int equal = PyObject_RichCompareBool(key, expected, Py_EQ);
                if (equal < 0) throw Failed();
                if (!equal) return false;
            }
            if (!flatten(value, PyTuple_GET_ITEM(spec, i + 2), leaves)) return false;
        }
        return true;
    }
    bool list = PyList_CheckExact(tree);
    if ((list ? PyList_GET_SIZE(tree) : PyTuple_GET_SIZE(tree)) != children(spec)) return false;
    for (Py_ssize_t i = 0; i < children(spec); ++i) {
        PyObject* part = list ? PyList_GET_ITEM(tree, i) : PyTuple_GET_ITEM(tree, i);
        if (!flatten(part, PyTuple_GET_ITEM(spec, i + 2), leaves)) return false;
    }
    return true;
}

// Build a tree; takes its leaves from `next` on.
Object unflatten(PyObject* spec, std::vector<Object>::iterator& next) {
    if (spec == Py_None) return std::move(*next++);
    PyObject* kind = PyTuple_GET_ITEM(spec, 0);
    if (kind == reinterpret_cast<PyObject*>(Py_TYPE(Py_None))) return owned(Py_None);
    if (kind == reinterpret_cast<PyObject*>(&PyDict_Type)) {
        Object tree(checked(PyDict_New()));
        PyObject* keys = PyTuple_GET_ITEM(spec, 1);
        for (Py_ssize_t i = 0; i < children(spec); ++i) {
            Object part = unflatten(PyTuple_GET_ITEM(spec, i + 2), next);
            if (PyDict_SetItem(tree.ptr, PyTuple_GET_ITEM(keys, i), part.ptr)) throw Failed();
        }
        return tree;
    }
    bool list = kind == reinterpret_cast<PyObject*>(&PyList_Type);
    Object tree(checked(list ? PyList_New(children(spec)) : PyTuple_New(children(spec))));
    for (Py_ssize_t i = 0; i < children(spec); ++i) {
        PyObject* part = unflatten(PyTuple_GET_ITEM(spec, i + 2), next).release();
        if (list) {
            PyList_SET_ITEM(tree.ptr, i, part);
        } else {
            PyTuple_SET_ITEM(tree.ptr, i, part);
        }
    }
    if (list || kind == reinterpret_cast<PyObject*>(&PyTuple_Type)) return tree;
    return Object(checked(PyObject_Call(kind, tree.ptr, nullptr)));  // a named tuple
}

}  // namespace
