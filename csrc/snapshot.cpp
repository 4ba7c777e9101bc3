// Whether some objects and dictionaries are as they were (lenet_fast/snapshot.py), in a fraction of the time that
// Python takes. Free of tensors.
#include <Python.h>

namespace {

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

// holds(types, lengths, entries): (object, type, ...), (dict, length, ...), (dict, key, value, ...).
PyObject* holds(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 3 || !PyTuple_Check(arguments[0]) || !PyTuple_Check(arguments[1]) || !PyTuple_Check(arguments[2])) {
    PyErr_SetString(PyExc_TypeError, "holds: expected three tuples");
    return nullptr;
  }
  PyObject* const types = arguments[0];
  for (Py_ssize_t i = 0; i + 1 < PyTuple_GET_SIZE(types); i += 2) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(PyTuple_GET_ITEM(types, i))) != PyTuple_GET_ITEM(types, i + 1)) {
      Py_RETURN_FALSE;
    }
  }
  PyObject* const lengths = arguments[1];
  for (Py_ssize_t i = 0; i + 1 < PyTuple_GET_SIZE(lengths); i += 2) {
    PyObject* const dict = PyTuple_GET_ITEM(lengths, i);
    if (!PyDict_Check(dict)) {
      PyErr_SetString(PyExc_TypeError, "holds: expected dictionaries");
      return nullptr;
    }
    const Py_ssize_t length = PyLong_AsSsize_t(PyTuple_GET_ITEM(lengths, i + 1));
    if (length < 0 && PyErr_Occurred() != nullptr) {
      return nullptr;
    }
    if (PyDict_GET_SIZE(dict) != length) {
      Py_RETURN_FALSE;
    }
  }
  PyObject* const entries = arguments[2];
  for (Py_ssize_t i = 0; i + 2 < PyTuple_GET_SIZE(entries); i += 3) {
    PyObject* const found = PyDict_GetItemWithError(PyTuple_GET_ITEM(entries, i), PyTuple_GET_ITEM(entries, i + 1));
    const int is_same = found != nullptr ? same(found, PyTuple_GET_ITEM(entries, i + 2)) : 0;
    if (is_same <= 0) {
      return PyErr_Occurred() != nullptr ? nullptr : Py_NewRef(Py_False);
    }
  }
  Py_RETURN_TRUE;
}

PyMethodDef methods[] = {
    {"holds", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&holds)), METH_FASTCALL,
     "Whether each object of (object, type, ...) is of that type, each dict of (dict, length, ...) has "
     "that length, and each of (dict, key, value, ...) that value there: the same object, or an "
     "equal int, float, str or tuple."},
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
