// The module lenet_fast._build_info: how this installation was built, and which CPU kernel variants the processor runs.
// Written with Python's stable C interface, so that one file serves every Python version from 3.10 on.
#include <Python.h>

#include <exception>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "g++ " __VERSION__;
#endif

PyObject* supported_isas(PyObject*, PyObject*) {
  const std::vector<std::string> isas = lenet_fast::cpu::supported_isas();
  PyObject* const list = PyList_New(static_cast<Py_ssize_t>(isas.size()));
  for (size_t i = 0; list != nullptr && i < isas.size(); ++i) {
    PyObject* const isa = PyUnicode_FromString(isas[i].c_str());
    if (isa == nullptr) {
      Py_DECREF(list);
      return nullptr;
    }
    PyList_SetItem(list, static_cast<Py_ssize_t>(i), isa);  // takes the reference
  }
  return list;
}

PyObject* selected_isa(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(lenet_fast::cpu::selected_isa().c_str());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyMethodDef methods[] = {
    {"supported_isas", &supported_isas, METH_NOARGS, "CPU kernel variants that this machine runs, the best one first."},
    {"selected_isa", &selected_isa, METH_NOARGS,
     "The CPU kernel variant in use; raises RuntimeError if LENET_FAST_CPU_ISA names one that cannot run here."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_build_info",
                          "How lenet_fast was built, and what the processor offers.",
                          0,
                          methods,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__build_info() {
  PyObject* const module = PyModule_Create(&definition);
  if (module == nullptr || PyModule_AddStringConstant(module, "compiler", kCompiler) < 0 ||
      PyModule_AddStringConstant(module, "flags", LENET_FAST_BUILD_FLAGS) < 0 ||
      PyModule_AddStringConstant(module, "torch_version", LENET_FAST_BUILD_TORCH) < 0 ||
      // Empty where the CUDA kernels were not built.
      PyModule_AddStringConstant(module, "cuda_architectures", LENET_FAST_BUILD_CUDA_ARCHITECTURES) < 0) {
    Py_XDECREF(module);
    return nullptr;
  }
  return module;
}
