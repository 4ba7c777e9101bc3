// Whether some objects and dictionaries are as they were (lenet_fast/snapshot.py), in a fraction of the time that
// Python takes. Free of tensors; written with Python's stable C interface, so that one file serves every version.
#include <Python.h>

#include <vector>

namespace {

struct TypedObject {
  PyObject *object, *type;
};
struct SizedDict {
  PyObject* dict;
  Py_ssize_t size;
};
struct Entry {
  PyObject *dict, *key, *value;
};

// What a Record owns: a reference to each object that it names.
struct Contents {
  std::vector<TypedObject> types;
  std::vector<SizedDict> sizes;
  std::vector<Entry> entries;

  template <typename F>
  int for_each(F&& visit) const {
    for (const TypedObject& one : types) {
      if (const int result = visit(one.object)) return result;
      if (const int result = visit(one.type)) return result;
    }
    for (const SizedDict& one : sizes) {
      if (const int result = visit(one.dict)) return result;
    }
    for (const Entry& one : entries) {
      if (const int result = visit(one.dict)) return result;
      if (const int result = visit(one.key)) return result;
      if (const int result = visit(one.value)) return result;
    }
    return 0;
  }
};

struct Record {
  PyObject_HEAD Contents* contents;
};

Record* as_record(PyObject* self) { return reinterpret_cast<Record*>(self); }

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  const Contents* const contents = as_record(self)->contents;
  return contents == nullptr ? 0 : contents->for_each([&](PyObject* one) { return visit(one, arg); });
}

int clear(PyObject* self) {
  Contents* const contents = as_record(self)->contents;
  as_record(self)->contents = nullptr;  // before objects die, whose finalizers may look at this one
  if (contents != nullptr) {
    contents->for_each([](PyObject* one) { return Py_DECREF(one), 0; });
    delete contents;
  }
  return 0;
}

void deallocate(PyObject* self) {
  PyTypeObject* const type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  clear(self);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

// A tuple's items in groups of `size`; false with an error set if it is no such tuple.
template <typename F>
bool for_each_group(PyObject* tuple, Py_ssize_t size, const char* name, F&& f) {
  if (!PyTuple_Check(tuple) || PyTuple_Size(tuple) % size != 0) {
    PyErr_Format(PyExc_TypeError, "%s: expected a tuple of groups of %zd", name, size);
    return false;
  }
  for (Py_ssize_t i = 0, count = PyTuple_Size(tuple); i < count; i += size) {
    if (!f([&](Py_ssize_t j) { return PyTuple_GetItem(tuple, i + j); })) {
      return false;
    }
  }
  return true;
}

bool is_dict(PyObject* object) {
  if (!PyDict_Check(object)) {
    PyErr_SetString(PyExc_TypeError, "Record: expected dictionaries");
    return false;
  }
  return true;
}

// Record(types, sizes, entries): (object, type, ...), (dict, size, ...), (dict, key, value, ...).
PyObject* create(PyTypeObject* type, PyObject* arguments, PyObject* names) {
  PyObject *types = nullptr, *sizes = nullptr, *entries = nullptr;
  if (names != nullptr && PyDict_Size(names) > 0) {
    PyErr_SetString(PyExc_TypeError, "Record: expected no keywords");
    return nullptr;
  }
  if (!PyArg_UnpackTuple(arguments, "Record", 3, 3, &types, &sizes, &entries)) {
    return nullptr;
  }
  PyObject* const self = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc))(type, 0);
  if (self == nullptr) {
    return nullptr;
  }
  auto* const contents = as_record(self)->contents = new Contents;
  const bool complete = for_each_group(types, 2, "types",
                                       [&](auto item) {
                                         contents->types.push_back({Py_NewRef(item(0)), Py_NewRef(item(1))});
                                         return true;
                                       }) &&
                        for_each_group(sizes, 2, "sizes",
                                       [&](auto item) {
                                         const Py_ssize_t size = PyLong_AsSsize_t(item(1));
                                         if (PyErr_Occurred() != nullptr || !is_dict(item(0))) {
                                           return false;
                                         }
                                         contents->sizes.push_back({Py_NewRef(item(0)), size});
                                         return true;
                                       }) &&
                        for_each_group(entries, 3, "entries", [&](auto item) {
                          if (!is_dict(item(0))) {
                            return false;
                          }
                          contents->entries.push_back({Py_NewRef(item(0)), Py_NewRef(item(1)), Py_NewRef(item(2))});
                          return true;
                        });
  if (!complete) {
    Py_DECREF(self);
    return nullptr;
  }
  return self;
}

// 1, 0, or -1 with an error set.
int same(PyObject* found, PyObject* expected) {
  if (found == expected) {
    return 1;
  }
  const bool is_plain =
      PyLong_Check(expected) || PyFloat_Check(expected) || PyUnicode_Check(expected) || PyTuple_Check(expected);
  if (!is_plain || Py_TYPE(found) != Py_TYPE(expected)) {
    return 0;
  }
  Py_INCREF(found);  // elements of a tuple may have a comparison in Python, which may do anything
  const int result = PyObject_RichCompareBool(found, expected, Py_EQ);
  Py_DECREF(found);
  return result;
}

PyObject* holds(PyObject* self, PyObject*) {
  const Contents* const contents = as_record(self)->contents;
  if (contents == nullptr) {  // the garbage collector has cleared it
    Py_RETURN_FALSE;
  }
  for (const TypedObject& one : contents->types) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(one.object)) != one.type) {
      Py_RETURN_FALSE;
    }
  }
  for (const SizedDict& one : contents->sizes) {
    if (PyDict_Size(one.dict) != one.size) {
      Py_RETURN_FALSE;
    }
  }
  for (const Entry& one : contents->entries) {
    PyObject* const found = PyDict_GetItemWithError(one.dict, one.key);
    const int is_same = found != nullptr ? same(found, one.value) : 0;
    if (is_same <= 0) {
      return PyErr_Occurred() != nullptr ? nullptr : Py_NewRef(Py_False);
    }
  }
  Py_RETURN_TRUE;
}

PyMethodDef methods[] = {
    {"holds", &holds, METH_NOARGS,
     "Whether each object of (object, type, ...) is of that type, each dict of (dict, size, ...) has that size, and "
     "each of (dict, key, value, ...) that value there: the same object, or an equal int, float, str or tuple."},
    {nullptr, nullptr, 0, nullptr}};

PyType_Slot slots[] = {{Py_tp_new, reinterpret_cast<void*>(&create)},
                       {Py_tp_dealloc, reinterpret_cast<void*>(&deallocate)},
                       {Py_tp_traverse, reinterpret_cast<void*>(&traverse)},
                       {Py_tp_clear, reinterpret_cast<void*>(&clear)},
                       {Py_tp_methods, methods},
                       {0, nullptr}};

PyType_Spec record_type = {"lenet_fast._snapshot.Record", sizeof(Record), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
                           slots};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_snapshot",
                          "Compares objects and dictionaries with what they were.",
                          0,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__snapshot() {
  PyObject* const module = PyModule_Create(&definition);
  PyObject* const type = module != nullptr ? PyType_FromSpec(&record_type) : nullptr;
  if (type == nullptr || PyModule_AddObjectRef(module, "Record", type) < 0) {
    Py_XDECREF(type);
    Py_XDECREF(module);
    return nullptr;
  }
  Py_DECREF(type);
  return module;
}
