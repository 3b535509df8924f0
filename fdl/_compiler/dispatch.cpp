// The steady state of a jitted function: a call that needs nothing that an earlier call did not.
//
// `call` compares the arguments with what a program was made for, hands over donated memory, runs
// the program and builds the result. Before it has changed anything it returns NotImplemented
// wherever something is new; `_jit.py` then does the same in Python, where all errors are raised.

#include <Python.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/TensorBase.h>
#include <c10/core/DefaultDtype.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

PyObject* THPVariable_Wrap(at::TensorBase&& tensor);  // of torch_python
namespace at::autocast {
ScalarType get_autocast_dtype(DeviceType device);
}

namespace {

using c10::TensorImpl;
using Impl = c10::intrusive_ptr<TensorImpl, c10::UndefinedTensorImpl>;
// The entry of a program of Inductor's C++ wrapper: it takes the tensors of the first array, and
// fills the second. Each is a pointer to a new at::Tensor, which is a pointer to a TensorImpl.
using Entry = void (*)(void**, void**);

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
    PyObject *tensor, *parameter, *donated;                  // classes
    PyObject *disabled, *watching, *tracing;                 // ContextVars
    PyObject *default_device, *peek_transform, *has_mode, *unflatten;  // functions
    PyObject *forward_ad, *intact;                           // dict of a module, name of an attribute
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
        auto dtype = [](c10::DeviceType device) { return int(at::autocast::get_autocast_dtype(device)); };
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

struct Program {
    Object spec, device, result_spec, read, run;
    std::vector<Form> forms;        // of the arguments, then of the closed-over tensors
    std::vector<size_t> donated;
    std::vector<Impl> placeholders;  // for each donated argument: what its object holds afterwards
    std::vector<Py_ssize_t> aliases;  // for each result: the input it is written to, or -1
    std::vector<size_t> places;     // of the inputs among the arguments, if they differ in order
    std::vector<size_t> result_places;  // of the results among those computed, likewise
    size_t outputs;                 // results without an alias
    bool writes, simple;            // `simple`: the result is built of containers known here
    Entry entry;                    // or null: then `run` is called
    Ambient ambient;
};

// ---- trees: the structures that `_signature.py` describes, as nested tuples ----

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

// ---- conditions ----

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
bool same_device(const Program& program) {
    if (!at::impl::PythonTorchFunctionTLS::stack_len()) return program.device.ptr == Py_None;
    Object device(checked(PyObject_CallNoArgs(python.default_device)));
    int equal = PyObject_RichCompareBool(device.ptr, program.device.ptr, Py_EQ);
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
        memory->resizable() && storage.data_ptr().get_deleter() == plain->storage().data_ptr().get_deleter() &&
        storage.nbytes() == static_cast<size_t>(impl->numel()) * impl->itemsize();
}

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

// Run a program; return its outputs.
std::vector<Impl> execute(const Program& program, std::vector<Impl>& inputs) {
    std::vector<Impl> outputs;
    outputs.reserve(program.outputs);
    if (program.entry) {
        std::vector<void*> in, out(program.outputs, nullptr);
        in.reserve(inputs.size());
        for (auto& input : inputs) in.push_back(new at::TensorBase(input));
        try {
            program.entry(in.data(), out.data());
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
    Object list(checked(PyList_New(inputs.size())));
    for (size_t i = 0; i < inputs.size(); ++i) PyList_SET_ITEM(list.ptr, i, wrap(inputs[i]));
    Object results(checked(PyObject_CallOneArg(program.run.ptr, list.ptr)));
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
    if (program.simple) return unflatten(program.result_spec.ptr, next);
    Object list(checked(PyList_New(results.size())));
    for (size_t i = 0; i < results.size(); ++i) PyList_SET_ITEM(list.ptr, i, results[i].release());
    return Object(checked(
        PyObject_CallFunctionObjArgs(python.unflatten, list.ptr, program.result_spec.ptr, nullptr)));
}

// Return the result of a program, or nothing if it was not made for these arguments.
Object attempt(
    const Program& program, PyObject* args, PyObject* kwargs, const Ambient& ambient) {
    if (!(ambient == program.ambient) || !same_device(program)) return Object();
    std::vector<PyObject*> leaves;
    leaves.reserve(program.forms.size());
    PyObject* spec = program.spec.ptr;
    if (!flatten(args, PyTuple_GET_ITEM(spec, 2), leaves) ||
        !flatten(kwargs, PyTuple_GET_ITEM(spec, 3), leaves)) {
        return Object();
    }
    for (size_t i = 0; i < leaves.size(); ++i) {
        if (!program.forms[i].fits(impl_of(leaves[i]))) return Object();
    }

    Object constants;
    if (program.read.ptr != Py_None) {
        Object now(checked(PyObject_CallNoArgs(program.read.ptr)));
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
        if (!is_alone(inputs[program.donated[j]].get(), program.placeholders[j].get())) {
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

constexpr const char* NAME = "fdl.program";

Program* program_of(PyObject* capsule) {
    return static_cast<Program*>(PyCapsule_GetPointer(capsule, NAME));
}

void free_program(PyObject* capsule) {
    delete program_of(capsule);
}

// call(programs, args, kwargs): return the result of the first that fits, or NotImplemented.
PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    try {
        if (count != 3) throw std::invalid_argument("call takes programs, args, kwargs");
        Object programs = owned(arguments[0]);
        if (PyList_GET_SIZE(programs.ptr) && !runs_inline()) {
            Ambient ambient;
            for (Py_ssize_t i = 0; i < PyList_GET_SIZE(programs.ptr); ++i) {
                Object capsule = owned(PyList_GET_ITEM(programs.ptr, i));
                Object result =
                    attempt(*program_of(capsule.ptr), arguments[1], arguments[2], ambient);
                if (result.ptr) return result.release();
            }
        }
        Py_RETURN_NOTIMPLEMENTED;
    } catch (const Failed&) {
        return nullptr;
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
}

// make(spec, device, result_spec, read, run, entry, leaves, donated, placeholders, aliases,
// places, result_places, writes): return a program.
PyObject* make(PyObject*, PyObject* values) {
    PyObject *spec, *device, *result_spec, *read, *run, *leaves, *donated, *placeholders, *aliases, *places, *result_places;
    unsigned long long entry;
    int writes;
    if (!PyArg_ParseTuple(
            values, "OOOOOKO!O!O!O!O!O!p", &spec, &device, &result_spec, &read, &run, &entry,
            &PyList_Type, &leaves, &PyList_Type, &donated, &PyList_Type, &placeholders,
            &PyList_Type, &aliases, &PyList_Type, &places, &PyList_Type, &result_places,
            &writes)) {
        return nullptr;
    }
    auto program = std::make_unique<Program>(Program{
        owned(spec), owned(device), owned(result_spec), owned(read), owned(run)});
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(leaves); ++i) {
        program->forms.emplace_back(impl_of(PyList_GET_ITEM(leaves, i)));
    }
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(donated); ++i) {
        program->donated.push_back(PyLong_AsSize_t(PyList_GET_ITEM(donated, i)));
        program->placeholders.push_back(share(impl_of(PyList_GET_ITEM(placeholders, i))));
    }
    for (auto [list, numbers] : {std::pair(places, &program->places),
                                 std::pair(result_places, &program->result_places)}) {
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
            numbers->push_back(PyLong_AsSize_t(PyList_GET_ITEM(list, i)));
        }
    }
    program->outputs = 0;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(aliases); ++i) {
        program->aliases.push_back(PyLong_AsSsize_t(PyList_GET_ITEM(aliases, i)));
        program->outputs += program->aliases.back() < 0;
    }
    if (PyErr_Occurred()) return nullptr;
    program->writes = writes;
    program->simple = is_simple(result_spec);
    program->entry = reinterpret_cast<Entry>(entry);
    PyObject* capsule = PyCapsule_New(program.get(), NAME, free_program);
    if (capsule) program.release();
    return capsule;
}

// takes(spec): whether trees of a structure can be read here.
PyObject* takes(PyObject*, PyObject* spec) {
    return PyBool_FromLong(is_simple(spec));
}

// install(...): set `python`; the last two arguments are a tensor and the address of its TensorImpl.
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
    Py_INCREF(values);  // with all that `python` points to
    Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL, ""},
    {"make", make, METH_VARARGS, ""},
    {"takes", takes, METH_O, ""},
    {"install", install, METH_VARARGS, ""},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "dispatch", "", -1, functions};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit_dispatch() {
    return PyModule_Create(&definition);
}
