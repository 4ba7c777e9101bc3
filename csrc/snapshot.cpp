// Whether some objects and dictionaries are as they were (lenet_fast/snapshot.py), in a fraction of the time that
// Python takes. Free of tensors; written with Python's stable C interface, so that one file serves every version.
#include <Python.h>

#include <new>
#include <vector>

namespace {

struct Object {
  PyObject *object, *type, *dict;  // dict Ellipsis: any
};
struct Item {
  PyObject *key, *value;  // Ellipsis: any
};
struct Dict {
  PyObject* dict;
  bool is_ordered;  // an OrderedDict has an order of its own, which PyDict_Next does not know
  std::vector<Item> items;
};

// What a Record owns: a reference to each object that it names.
struct Contents {
  std::vector<Object> objects;
  std::vector<Dict> dicts;

  // Calls `visit` with each of them until it returns something else than 0.
  template <typename F>
  int for_each(F&& visit) const {
    int result = 0;
    const auto visit_all = [&](auto... all) { return ((result = visit(all)) || ...); };
    for (const Object& one : objects) {
      if (visit_all(one.object, one.type, one.dict)) {
        return result;
      }
    }
    for (const Dict& one : dicts) {
      if (visit_all(one.dict)) {
        return result;
      }
      for (const Item& item : one.items) {
        if (visit_all(item.key, item.value)) {
          return result;
        }
      }
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

// 1, 0, or -1 with an error set.
int is_ordered(PyObject* dict) {
  PyObject* const collections = PyImport_ImportModule("collections");
  PyObject* const type = collections != nullptr ? PyObject_GetAttrString(collections, "OrderedDict") : nullptr;
  const int result = type != nullptr ? PyObject_IsInstance(dict, type) : -1;
  Py_XDECREF(type);
  Py_XDECREF(collections);
  return result;
}

bool add_dict(Contents& contents, PyObject* dict, PyObject* items) {
  if (!PyDict_Check(dict)) {
    PyErr_SetString(PyExc_TypeError, "dicts: expected dictionaries, each with a tuple of its items");
    return false;
  }
  const int ordered = is_ordered(dict);
  if (ordered < 0) {
    return false;
  }
  contents.dicts.push_back({Py_NewRef(dict), ordered > 0, {}});
  return for_each_group(items, 2, "items", [&](auto item) {
    contents.dicts.back().items.push_back({Py_NewRef(item(0)), Py_NewRef(item(1))});
    return true;
  });
}

// Record(objects, dicts): (object, type, its dict, ...), (dict, items, ...), items being (key, value, ...).
PyObject* create(PyTypeObject* type, PyObject* arguments, PyObject* names) {
  PyObject *objects = nullptr, *dicts = nullptr;
  if (names != nullptr && PyDict_Size(names) > 0) {
    PyErr_SetString(PyExc_TypeError, "Record: expected no keywords");
    return nullptr;
  }
  if (!PyArg_UnpackTuple(arguments, "Record", 2, 2, &objects, &dicts)) {
    return nullptr;
  }
  PyObject* const self = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc))(type, 0);
  if (self == nullptr) {
    return nullptr;
  }
  try {
    Contents& contents = *(as_record(self)->contents = new Contents);
    const auto add_object = [&](auto item) {
      contents.objects.push_back({Py_NewRef(item(0)), Py_NewRef(item(1)), Py_NewRef(item(2))});
      return true;
    };
    if (for_each_group(objects, 3, "objects", add_object) &&
        for_each_group(dicts, 2, "dicts", [&](auto item) { return add_dict(contents, item(0), item(1)); })) {
      return self;
    }
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  }
  Py_DECREF(self);
  return nullptr;
}

// 1, 0, or -1 with an error set. A comparison that raises says no: the objects differ, in whatever way.
int equal(PyObject* found, PyObject* expected) {
  const bool is_plain = PyLong_Check(expected) || PyFloat_Check(expected) || PyUnicode_Check(expected) ||
                        PyTuple_Check(expected) || PyList_Check(expected);
  if (!is_plain || Py_TYPE(found) != Py_TYPE(expected)) {
    return 0;
  }
  Py_INCREF(found);  // elements of a tuple may have a comparison in Python, which may do anything
  int result = PyObject_RichCompareBool(found, expected, Py_EQ);
  Py_DECREF(found);
  if (result < 0 && PyErr_ExceptionMatches(PyExc_Exception)) {
    PyErr_Clear();
    result = 0;
  }
  return result;
}

// Whether `found` is the object `expected`, or an int, float, str, tuple or list of the same type that equals it;
// Ellipsis expects anything.
inline int same(PyObject* found, PyObject* expected) {
  return found == expected || expected == Py_Ellipsis ? 1 : equal(found, expected);
}

// The same for a key and its value.
inline int same_item(PyObject* key, PyObject* value, const Item& expected) {
  if (key == expected.key && (value == expected.value || expected.value == Py_Ellipsis)) {
    return 1;
  }
  Py_INCREF(value);  // which comparing the keys may drop
  int result = same(key, expected.key);
  if (result > 0) {
    result = same(value, expected.value);
  }
  Py_DECREF(value);
  return result;
}

int is_same_object(const Object& expected) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(expected.object)) != expected.type) {
    return 0;
  }
  if (expected.dict == Py_Ellipsis) {
    return 1;
  }
  PyObject* const found = PyObject_GenericGetDict(expected.object, nullptr);
  Py_XDECREF(found);  // the object has it still
  return found == nullptr ? -1 : found == expected.dict;
}

int has_ordered_items(const Dict& expected) {
  PyObject* const pairs = PyMapping_Items(expected.dict);
  if (pairs == nullptr) {
    return -1;
  }
  int result = static_cast<size_t>(PyList_Size(pairs)) == expected.items.size();
  for (size_t i = 0; result > 0 && i < expected.items.size(); ++i) {
    PyObject* const pair = PyList_GetItem(pairs, static_cast<Py_ssize_t>(i));
    const bool is_pair = PyTuple_Check(pair) && PyTuple_Size(pair) == 2;  // a class derived from OrderedDict may differ
    result = is_pair ? same_item(PyTuple_GetItem(pair, 0), PyTuple_GetItem(pair, 1), expected.items[i]) : 0;
  }
  Py_DECREF(pairs);
  return result;
}

// Whether the dictionary has the expected items in their order.
int has_items(const Dict& expected) {
  if (static_cast<size_t>(PyDict_Size(expected.dict)) != expected.items.size()) {
    return 0;
  }
  if (expected.is_ordered && !expected.items.empty()) {
    return has_ordered_items(expected);
  }
  Py_ssize_t position = 0;
  PyObject *key = nullptr, *value = nullptr;
  for (const Item& item : expected.items) {
    const int result = PyDict_Next(expected.dict, &position, &key, &value) != 0 ? same_item(key, value, item) : 0;
    if (result <= 0) {
      return result;
    }
  }
  return 1;
}

PyObject* holds(PyObject* self, PyObject*) {
  int result = as_record(self)->contents != nullptr;  // null: the garbage collector has cleared it
  if (result > 0) {
    const Contents& contents = *as_record(self)->contents;
    for (size_t i = 0; result > 0 && i < contents.objects.size(); ++i) {
      result = is_same_object(contents.objects[i]);
    }
    for (size_t i = 0; result > 0 && i < contents.dicts.size(); ++i) {
      result = has_items(contents.dicts[i]);
    }
  }
  return result < 0 ? nullptr : Py_NewRef(result > 0 ? Py_True : Py_False);
}

PyMethodDef methods[] = {
    {"holds", &holds, METH_NOARGS,
     "Whether each object of (object, type, its dict, ...) is of that type and has that dict, and each dict of "
     "(dict, items, ...) has those items in that order, items being (key, value, ...): the same object, or an equal "
     "int, float, str, tuple or list. Ellipsis in the place of a dict or value stands for any."},
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
