// The steady state of a jitted function: a call that needs nothing that an earlier call did not.
//
// `call` compares the arguments with what a program was made for, hands over donated memory, runs
// the program and builds the result. Before it has changed anything it returns NotImplemented
// wherever something is new; `_jit.py` then does the same in Python, where all errors are raised.

#include <memory>
#include <stdexcept>
#include <vector>

#include "conditions.h"
#include "elementwise.h"
#include "trees.h"

namespace {

// The entry of a program of Inductor's C++ wrapper: it takes the tensors of the first array, and
// fills the second. Each is a pointer to a new at::Tensor, which is a pointer to a TensorImpl.
using Entry = void (*)(void**, void**);

struct Program {
    PyObject *spec, *device, *result_spec, *read, *run;  // owned by the tuple that `make` returns
    std::vector<Form> forms;        // of the arguments, then of the closed-over tensors
    std::vector<size_t> donated;
    std::vector<Impl> placeholders;  // for each donated argument: what its object holds afterwards
    std::vector<Impl> plain;         // and a tensor whose memory was allocated in the usual way
    std::vector<Py_ssize_t> aliases;  // for each result: the input it is written to, or -1
    std::vector<size_t> places;     // of the inputs among the arguments, if they differ in order
    std::vector<size_t> result_places;  // of the results among those computed, likewise
    size_t outputs;                 // results without an alias
    bool writes, simple;            // `simple`: the result is built of containers known here
    Entry entry;                    // or null: then `run` is called
    Ambient ambient;
};

// ---- a call ----

struct Donated {  // an argument that has been given away
    Object object;
    Object kind;
    Impl value;
};

void invalidate(Donated& argument, const Impl& placeholder) {
    impl_of(argument.object.ptr)->shallow_copy_from(placeholder);
    if (PyObject_SetAttrString(argument.object.ptr, "__class__", python.donated)) throw Failed();
}

void revalidate(std::vector<Donated>& arguments) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    if (value && PyObject_HasAttr(value, python.intact)) {
        for (auto& argument : arguments) {
            PyObject_SetAttrString(argument.object.ptr, "__class__", argument.kind.ptr);
            impl_of(argument.object.ptr)->shallow_copy_from(argument.value);
        }
    }
    PyErr_Restore(type, value, trace);
}

// Run the code of a program; return its outputs.
std::vector<Impl> execute(Entry entry, const std::vector<Impl>& inputs, size_t count) {
    std::vector<Impl> outputs;
    outputs.reserve(count);
    std::vector<void*> in, out(count, nullptr);
    in.reserve(inputs.size());
    for (auto& input : inputs) in.push_back(new at::TensorBase(input));
    try {
        entry(in.data(), out.data());
    } catch (const std::exception& error) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, error.what());
    } catch (...) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, "an unknown C++ error");
    }
    for (void* handle : out) {
        if (!handle) continue;
        auto* tensor = static_cast<at::TensorBase*>(handle);
        outputs.push_back(share(tensor->unsafeGetTensorImpl()));
        delete tensor;
    }
    if (PyErr_Occurred()) throw Failed();
    return outputs;
}

std::vector<Impl> execute(const Program& program, std::vector<Impl>& inputs) {
    if (program.entry) return execute(program.entry, inputs, program.outputs);
    std::vector<Impl> outputs;
    outputs.reserve(program.outputs);
    Object list(checked(PyList_New(inputs.size())));
    for (size_t i = 0; i < inputs.size(); ++i) PyList_SET_ITEM(list.ptr, i, wrap(inputs[i]));
    Object results(checked(PyObject_CallOneArg(program.run, list.ptr)));
    Object sequence(checked(PySequence_Fast(results.ptr, "a program returned no sequence")));
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(sequence.ptr); ++i) {
        outputs.push_back(share(impl_of(PySequence_Fast_GET_ITEM(sequence.ptr, i))));
    }
    return outputs;
}

// Put the first elements into another order.
template <typename T>
std::vector<T> in_order(std::vector<T> values, const std::vector<size_t>& places) {
    if (places.empty()) return values;
    std::vector<T> ordered;
    ordered.reserve(values.size());
    for (auto place : places) ordered.push_back(std::move(values[place]));
    for (size_t i = places.size(); i < values.size(); ++i) ordered.push_back(std::move(values[i]));
    return ordered;
}

Object build(const Program& program, std::vector<Impl>& inputs, std::vector<Impl>& outputs) {
    std::vector<Object> results;
    results.reserve(program.aliases.size());
    auto output = outputs.begin();
    for (auto alias : program.aliases) {
        results.emplace_back(wrap(std::move(alias < 0 ? *output++ : inputs[alias])));
    }
    results = in_order(std::move(results), program.result_places);
    auto next = results.begin();
    if (program.simple) return unflatten(program.result_spec, next);
    Object list(checked(PyList_New(results.size())));
    for (size_t i = 0; i < results.size(); ++i) PyList_SET_ITEM(list.ptr, i, results[i].release());
    return Object(checked(PyObject_CallFunctionObjArgs(
        python.unflatten, list.ptr, program.result_spec, nullptr)));
}

// Return the result of a program, or nothing if it was not made for these arguments.
Object attempt(
    const Program& program, PyObject* args, PyObject* kwargs, const Ambient& ambient) {
    if (!(ambient == program.ambient) || !is_default_device(program.device)) return Object();
    std::vector<PyObject*> leaves;
    leaves.reserve(program.forms.size());
    PyObject* spec = program.spec;
    if (!flatten(args, PyTuple_GET_ITEM(spec, 2), leaves) ||
        !flatten(kwargs, PyTuple_GET_ITEM(spec, 3), leaves)) {
        return Object();
    }
    for (size_t i = 0; i < leaves.size(); ++i) {
        if (!program.forms[i].fits(impl_of(leaves[i]))) return Object();
    }

    Object constants;
    if (program.read != Py_None) {
        Object now(checked(PyObject_CallNoArgs(program.read)));
        std::swap(constants.ptr, now.ptr);
        if (!PyList_CheckExact(constants.ptr)) return Object();  // it must be traced again
        if (leaves.size() + PyList_GET_SIZE(constants.ptr) != program.forms.size()) return Object();
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(constants.ptr); ++i) {
            PyObject* leaf = PyList_GET_ITEM(constants.ptr, i);
            if (!is_tensor(leaf) || !program.forms[leaves.size()].fits(impl_of(leaf))) {
                return Object();
            }
            leaves.push_back(leaf);
        }
    }
    std::vector<Impl> inputs;
    inputs.reserve(leaves.size());
    for (auto* leaf : leaves) inputs.push_back(share(impl_of(leaf)));
    for (size_t j = 0; j < program.donated.size(); ++j) {
        if (!is_alone(inputs[program.donated[j]].get(), program.plain[j].get())) {
            return Object();
        }
    }

    std::vector<Donated> given;
    given.reserve(program.donated.size());
    for (auto i : program.donated) {
        PyObject* kind = reinterpret_cast<PyObject*>(Py_TYPE(leaves[i]));
        given.push_back({owned(leaves[i]), owned(kind), program.writes ? detach(inputs[i].get())
                                                                       : Impl()});
    }
    if (program.writes) {
        for (size_t j = 0; j < given.size(); ++j) {
            inputs[program.donated[j]] = given[j].value;
            invalidate(given[j], program.placeholders[j]);
        }
    }
    inputs = in_order(std::move(inputs), program.places);
    std::vector<Impl> outputs;
    try {
        outputs = execute(program, inputs);
    } catch (const Failed&) {
        if (program.writes) revalidate(given);
        throw;
    }
    if (!program.writes) {
        for (size_t j = 0; j < given.size(); ++j) invalidate(given[j], program.placeholders[j]);
    }
    return build(program, inputs, outputs);
}

// ---- functions of the module ----

// Return what a function returns; where it throws, a null pointer with a Python error.
template <typename F>
PyObject* guarded(F f) {
    try {
        return f();
    } catch (const Failed&) {
        return nullptr;
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
}

constexpr const char* NAME = "fdl.program";

Program* program_of(PyObject* capsule) {
    return static_cast<Program*>(PyCapsule_GetPointer(capsule, NAME));
}

void free_program(PyObject* capsule) {
    delete program_of(capsule);
}

// call(programs, args, kwargs): return the result of the first that fits, or NotImplemented.
PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    return guarded([&]() -> PyObject* {
        if (count != 3) throw std::invalid_argument("call takes programs, args, kwargs");
        Object programs = owned(arguments[0]);
        if (PyList_GET_SIZE(programs.ptr) && !runs_inline()) {
            Ambient ambient;
            for (Py_ssize_t i = 0; i < PyList_GET_SIZE(programs.ptr); ++i) {
                Object tuple = owned(PyList_GET_ITEM(programs.ptr, i));
                const Program& program = *program_of(PyTuple_GET_ITEM(tuple.ptr, 0));
                Object result = attempt(program, arguments[1], arguments[2], ambient);
                if (result.ptr) return result.release();
            }
        }
        Py_RETURN_NOTIMPLEMENTED;
    });
}

// make(spec, device, result_spec, read, run, entry, leaves, donated, placeholders, plain, aliases,
// places, result_places, writes): return a program.
PyObject* make(PyObject*, PyObject* values) {
    PyObject *spec, *device, *result_spec, *read, *run;
    PyObject *leaves, *donated, *placeholders, *plain, *aliases, *places, *result_places;
    unsigned long long entry;
    int writes;
    if (!PyArg_ParseTuple(
            values, "OOOOOKO!O!O!O!O!O!O!p", &spec, &device, &result_spec, &read, &run, &entry,
            &PyList_Type, &leaves, &PyList_Type, &donated, &PyList_Type, &placeholders, &PyList_Type, &plain,
            &PyList_Type, &aliases, &PyList_Type, &places, &PyList_Type, &result_places,
            &writes)) {
        return nullptr;
    }
    return guarded([&]() -> PyObject* {
        auto program = std::make_unique<Program>(Program{spec, device, result_spec, read, run});
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(leaves); ++i) {
            program->forms.emplace_back(impl_of(PyList_GET_ITEM(leaves, i)));
        }
        program->donated = numbers(donated);
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(donated); ++i) {
            program->placeholders.push_back(share(impl_of(PyList_GET_ITEM(placeholders, i))));
            program->plain.push_back(share(impl_of(PyList_GET_ITEM(plain, i))));
        }
        program->places = numbers(places);
        program->result_places = numbers(result_places);
        program->outputs = 0;
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(aliases); ++i) {
            program->aliases.push_back(PyLong_AsSsize_t(PyList_GET_ITEM(aliases, i)));
            program->outputs += program->aliases.back() < 0;
        }
        if (PyErr_Occurred()) throw Failed();
        program->writes = writes;
        program->simple = is_simple(result_spec);
        program->entry = reinterpret_cast<Entry>(entry);
        Object capsule(checked(PyCapsule_New(program.get(), NAME, free_program)));
        program.release();
        // A tuple, because the garbage collector does not see what a capsule holds, and a function
        // may be reached from the tensors that it closes over.
        return PyTuple_Pack(6, capsule.ptr, spec, device, result_spec, read, run);
    });
}

// execute(entry, inputs, count): return the outputs of the code of a program.
PyObject* execute_entry(PyObject*, PyObject* values) {
    unsigned long long entry;
    PyObject* tensors;
    Py_ssize_t count;
    if (!PyArg_ParseTuple(values, "KO!n", &entry, &PyList_Type, &tensors, &count)) return nullptr;
    return guarded([&]() -> PyObject* {
        std::vector<Impl> inputs;
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors); ++i) {
            inputs.push_back(share(impl_of(PyList_GET_ITEM(tensors, i))));
        }
        auto outputs = execute(reinterpret_cast<Entry>(entry), inputs, count);
        Object results(checked(PyList_New(count)));
        for (Py_ssize_t i = 0; i < count; ++i) PyList_SET_ITEM(results.ptr, i, wrap(outputs[i]));
        return results.release();
    });
}

// takes(spec): whether trees of a structure can be read here.
PyObject* takes(PyObject*, PyObject* spec) {
    return PyBool_FromLong(is_simple(spec));
}

// elementwise(symbols, operands, results, scalars, columns): return the tensors of each result for
// all leaves, or NotImplemented if this is not for `elementwise.h`.
PyObject* compute_elementwise(PyObject*, PyObject* values) {
    const char* symbols;
    PyObject *operands, *results, *scalars, *columns;
    if (!PyArg_ParseTuple(
            values, "sO!O!O!O!", &symbols, &PyList_Type, &operands, &PyList_Type, &results,
            &PyList_Type, &scalars, &PyList_Type, &columns)) {
        return nullptr;
    }
    return guarded([&]() -> PyObject* {
        Maths maths{symbols, numbers(operands), numbers(results)};
        Object computed = elementwise(maths, scalars, columns);
        if (computed.ptr) return computed.release();
        Py_RETURN_NOTIMPLEMENTED;
    });
}

// install(...): set `python`; the last two arguments are a tensor and its `_cdata`.
PyObject* install(PyObject*, PyObject* values) {
    PyObject* example;
    unsigned long long address;
    if (!PyArg_ParseTuple(
            values, "OOOOOOOOOOOOOK", &python.tensor, &python.parameter, &python.donated,
            &python.disabled, &python.watching, &python.tracing, &python.default_device,
            &python.peek_transform, &python.has_mode, &python.unflatten, &python.forward_ad,
            &python.intact, &example, &address)) {
        return nullptr;
    }
    if (reinterpret_cast<unsigned long long>(impl_of(example)) != address) {
        PyErr_SetString(PyExc_ImportError, "tensors have another layout in this release of torch");
        return nullptr;
    }
    begin_square_roots();
    Py_INCREF(values);  // with all that `python` points to
    Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL, ""},
    {"make", make, METH_VARARGS, ""},
    {"execute", execute_entry, METH_VARARGS, ""},
    {"takes", takes, METH_O, ""},
    {"elementwise", compute_elementwise, METH_VARARGS, ""},
    {"install", install, METH_VARARGS, ""},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "dispatch", "", -1, functions};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit_dispatch() {
    return PyModule_Create(&definition);
}
