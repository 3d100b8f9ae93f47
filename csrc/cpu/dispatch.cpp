// Picks the kernels of the machine's instruction set, once.
#include "../capability.h"
#include "kernels.h"

namespace bcos::cpu {
namespace {

struct Tables {
  Kernels of_type[4];

  Tables() {
    const Capability capability = cpu_capability();
    for (int t = 0; t < 4; t++) {
      const Type type = static_cast<Type>(t);
      Kernels* table = &of_type[t];
#if defined(BCOS_HAVE_AVX512)
      if (capability == Capability::avx512) {
        avx512::register_scale(table, type);
        avx512::register_norm(table, type);
        avx512::register_batch_norm(table, type);
        avx512::register_scale_norm(table, type);
        avx512::register_scale_gelu(table, type);
        avx512::register_layer_norm(table, type);
        continue;
      }
#endif
#if defined(BCOS_HAVE_AVX2)
      if (capability == Capability::avx2) {
        avx2::register_scale(table, type);
        avx2::register_norm(table, type);
        avx2::register_batch_norm(table, type);
        avx2::register_scale_norm(table, type);
        avx2::register_scale_gelu(table, type);
        avx2::register_layer_norm(table, type);
        continue;
      }
#endif
      (void)capability;
      baseline::register_scale(table, type);
      baseline::register_norm(table, type);
      baseline::register_batch_norm(table, type);
      baseline::register_scale_norm(table, type);
      baseline::register_scale_gelu(table, type);
      baseline::register_layer_norm(table, type);
    }
  }
};

}  // namespace

const Kernels& kernels(Type type) {
  static const Tables tables;
  return tables.of_type[static_cast<int>(type)];
}

}  // namespace bcos::cpu
