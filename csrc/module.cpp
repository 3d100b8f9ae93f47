// The Python module bcos_kernels._C: how the package was built, and what this machine can run. It holds no kernel and
// links no torch, so importing it costs nothing; the kernels are in bcos_kernels/_lib, loaded by torch.ops.load_library.

#include <pybind11/pybind11.h>

#include <string>

#include "build_config.h"  // written by setup.py: BCOS_BUILD_*
#include "capability.h"

namespace py = pybind11;

namespace {

py::tuple words(const char* text) {
  return py::tuple(py::str(text).attr("split")());
}

py::dict build_info() {
  py::dict info;
  info["version"] = BCOS_BUILD_VERSION;
  info["compiler"] = BCOS_BUILD_COMPILER;
  info["torch"] = BCOS_BUILD_TORCH;
  info["torch_abi"] = BCOS_BUILD_TORCH_ABI;
#ifdef _GLIBCXX_USE_CXX11_ABI
  info["cxx11_abi"] = static_cast<bool>(_GLIBCXX_USE_CXX11_ABI);
#else
  info["cxx11_abi"] = py::none();  // another standard library than libstdc++
#endif
  info["instruction_sets"] = words(BCOS_BUILD_INSTRUCTION_SETS);
  info["cuda_archs"] = words(BCOS_BUILD_CUDA_ARCHS);
  info["flags"] = BCOS_BUILD_FLAGS;
  return info;
}

py::dict cpu_features() {
  const bcos::CpuFeatures f = bcos::cpu_features();
  py::dict features;
  features["avx2"] = f.avx2;
  features["fma"] = f.fma;
  features["f16c"] = f.f16c;
  features["avx512f"] = f.avx512f;
  features["avx512bw"] = f.avx512bw;
  features["avx512vl"] = f.avx512vl;
  features["avx512dq"] = f.avx512dq;
  return features;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "How bcos_kernels was built, and what this machine can run.";
  m.def("build_info", &build_info,
        "dict: version, compiler, torch (whose headers were used), torch_abi (the oldest torch that is served), cxx11_abi, "
        "instruction_sets and cuda_archs (tuples), flags.");
  m.def("cpu_capability", [] { return std::string(bcos::name(bcos::cpu_capability())); },
        "'avx512', 'avx2' or 'baseline': the instruction set that the CPU kernels use here. The environment variable "
        "BCOS_CPU_CAPABILITY lowers it.");
  m.def("cpu_features", &cpu_features,
        "dict: the processor features that cpu_capability looks at, as the processor and the operating system report them.");
}
