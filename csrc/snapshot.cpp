// Whether some objects and dictionaries are as they were (lenet_fast/snapshot.py), in a fraction of the time that
// Python takes. Free of tensors.
#include <Python.h>

namespace {

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
inline int same_item(PyObject* key, PyObject* value, PyObject* const* expected) {
  if (key == expected[0] && (value == expected[1] || expected[1] == Py_Ellipsis)) {
    return 1;
  }
  Py_INCREF(value);  // which comparing the keys may drop
  int result = same(key, expected[0]);
  if (result > 0) {
    result = same(value, expected[1]);
  }
  Py_DECREF(value);
  return result;
}

int has_dict(PyObject* object, PyObject* expected) {
  if (expected == Py_Ellipsis) {
    return 1;
  }
  PyObject* const found = PyObject_GenericGetDict(object, nullptr);
  Py_XDECREF(found);  // the object has it still
  return found == nullptr ? -1 : found == expected;
}

// Whether the items of `dict`, in their order, are items[0] with the value items[1], items[2] with items[3], ...
int has_items(PyObject* dict, PyObject* items) {
  const Py_ssize_t size = PyTuple_GET_SIZE(items);
  if (2 * PyDict_GET_SIZE(dict) != size) {
    return 0;
  }
  PyObject* const* const expected = PySequence_Fast_ITEMS(items);
  int result = 1;
  if (PyODict_Check(dict) && size > 0) {  // has an order of its own, which PyDict_Next does not know
    PyObject* const pairs = PyMapping_Items(dict);
    result = pairs != nullptr ? 2 * PyList_GET_SIZE(pairs) == size : -1;
    for (Py_ssize_t i = 0; result > 0 && i < size; i += 2) {
      PyObject* const pair = PyList_GET_ITEM(pairs, i / 2);
      result = same_item(PyTuple_GET_ITEM(pair, 0), PyTuple_GET_ITEM(pair, 1), expected + i);
    }
    Py_XDECREF(pairs);
    return result;
  }
  Py_ssize_t position = 0;
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t i = 0; result > 0 && i < size; i += 2) {
    result = PyDict_Next(dict, &position, &key, &value) != 0 ? same_item(key, value, expected + i) : 0;
  }
  return result;
}

PyObject* as_bool(int result) { return result < 0 ? nullptr : Py_NewRef(result > 0 ? Py_True : Py_False); }

// holds(objects, dicts): (object, type, its dict, ...), (dict, items, ...).
PyObject* holds(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2 || !PyTuple_Check(arguments[0]) || !PyTuple_Check(arguments[1])) {
    PyErr_SetString(PyExc_TypeError, "holds: expected two tuples");
    return nullptr;
  }
  PyObject* const objects = arguments[0];
  for (Py_ssize_t i = 0; i + 2 < PyTuple_GET_SIZE(objects); i += 3) {
    PyObject* const object = PyTuple_GET_ITEM(objects, i);
    if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != PyTuple_GET_ITEM(objects, i + 1)) {
      Py_RETURN_FALSE;
    }
    if (const int result = has_dict(object, PyTuple_GET_ITEM(objects, i + 2)); result <= 0) {
      return as_bool(result);
    }
  }
  PyObject* const dicts = arguments[1];
  for (Py_ssize_t i = 0; i + 1 < PyTuple_GET_SIZE(dicts); i += 2) {
    PyObject *const dict = PyTuple_GET_ITEM(dicts, i), *const items = PyTuple_GET_ITEM(dicts, i + 1);
    if (!PyDict_Check(dict) || !PyTuple_Check(items)) {
      PyErr_SetString(PyExc_TypeError, "holds: expected dictionaries, each with a tuple of its items");
      return nullptr;
    }
    if (const int result = has_items(dict, items); result <= 0) {
      return as_bool(result);
    }
  }
  Py_RETURN_TRUE;
}

PyMethodDef methods[] = {
    {"holds", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&holds)), METH_FASTCALL,
     "Whether each object of (object, type, its dict, ...) is of that type and has that dict, and each dict of "
     "(dict, items, ...) has those items in that order, items being (key, value, ...): the same object, or an equal "
     "int, float, str, tuple or list. Ellipsis in the place of a dict or value stands for any."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_snapshot",
                      "Compares dictionaries with what they were.",
                      0,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__snapshot() { return PyModule_Create(&module); }
