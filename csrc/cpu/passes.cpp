// The passes around a product, split over threads.
#include "passes.h"

#include <cmath>

namespace bcos::cpu {

bool is_one_pixel(const Window& w) {
  return w.kernel[0] * w.kernel[1] == 1 && w.stride[0] == 1 && w.stride[1] == 1 && w.padding[0] == 0 && w.padding[1] == 0;
}

void row_norms(const void* x, void* n, Type type, int64_t rows, int64_t columns, bool linear) {
  const Kernels& k = kernels(type);
  in_parallel(rows, columns, [&](int64_t begin, int64_t end) { k.norm_rows(x, n, columns, linear, begin, end); });
}

void window_norms(const void* x, void* n, Type type, const Layout& l, const Window& w) {
  const Kernels& k = kernels(type);
  if (l.rows && l.groups == 1 && is_one_pixel(w)) return row_norms(x, n, type, l.images * l.pixels, l.channels, false);
  const int64_t maps = l.images * l.groups;
  const Scratch map(wide_bytes(maps * l.pixels, type)), scratch(wide_bytes(maps * w.height * w.out_width, type));
  if (l.rows) {
    in_parallel(l.images * l.pixels, l.channels, [&](int64_t begin, int64_t end) {
      k.sum_squares_rows(x, map.get(), l, begin, end);
    });
  } else {
    in_parallel(maps, l.pixels * l.channels / l.groups, [&](int64_t begin, int64_t end) {
      k.sum_squares_planes(x, map.get(), l, begin, end);
    });
  }
  in_parallel(maps, (w.height + w.out_height) * w.out_width * w.kernel[1], [&](int64_t begin, int64_t end) {
    k.window_norm(map.get(), n, scratch.get(), w, begin, end);
  });
}

namespace {

void add_map(void* dx, const void* x, const void* map, Type type, const Layout& l) {
  const Kernels& k = kernels(type);
  if (l.rows) {
    in_parallel(l.images * l.pixels, l.channels, [&](int64_t begin, int64_t end) {
      k.add_norm_term_rows(dx, dx, x, map, l, begin, end);
    });
  } else {
    in_parallel(l.images * l.channels, l.pixels, [&](int64_t begin, int64_t end) {
      k.add_norm_term_planes(dx, dx, x, map, l, begin, end);
    });
  }
}

int64_t plane_blocks(const Layout& l) { return l.images * l.groups * ((l.pixels + kBlock - 1) / kBlock); }

}  // namespace

void add_norm_gradient(void* dx, const void* x, const void* q, Type type, const Layout& l, const Window& w) {
  if (is_one_pixel(w)) return add_map(dx, x, q, type, l);
  const Kernels& k = kernels(type);
  const int64_t maps = l.images * l.groups;
  const Scratch map(wide_bytes(maps * l.pixels, type)), scratch(wide_bytes(maps * w.height * w.out_width, type));
  in_parallel(maps, (w.height + w.out_height) * w.out_width * w.kernel[1], [&](int64_t begin, int64_t end) {
    k.window_spread(q, map.get(), scratch.get(), w, begin, end);
  });
  add_map(dx, x, map.get(), type, l);
}

void scale(const ScaleArguments& s, Type type) {
  const Kernels& k = kernels(type);
  const Layout& l = s.layout;
  if (l.rows) {
    in_parallel(l.images * l.pixels, l.channels * s.max_out, [&](int64_t begin, int64_t end) { k.scale_rows(s, begin, end); });
  } else {
    in_parallel(plane_blocks(l), l.channels / l.groups * s.max_out * std::min(l.pixels, kBlock),
                [&](int64_t begin, int64_t end) { k.scale_planes(s, begin, end); });
  }
}

int64_t partial_sums(const Layout& l) { return l.rows ? l.images * l.pixels : plane_blocks(l); }

void scale_backward(const ScaleBackwardArguments& s, Type type) {
  const Kernels& k = kernels(type);
  const Layout& l = s.layout;
  if (l.rows) {
    in_parallel(l.images * l.pixels, l.channels * s.max_out, [&](int64_t begin, int64_t end) {
      k.scale_backward_rows(s, begin, end);
    });
  } else {
    in_parallel(plane_blocks(l), l.channels / l.groups * s.max_out * std::min(l.pixels, kBlock),
                [&](int64_t begin, int64_t end) { k.scale_backward_planes(s, begin, end); });
  }
}

Tensor normalized(const Tensor& w) {
  const Tensor w_hat = empty_like(w, w.scalar_type());
  const Kernels& k = kernels(type_of(w));
  const int64_t units = w.size(0), columns = units == 0 ? 0 : w.numel() / units;
  const void* from = w.data_ptr();
  void* to = w_hat.data_ptr();
  in_parallel(units, columns, [&](int64_t begin, int64_t end) { k.normalize_weight(from, to, columns, begin, end); });
  return w_hat;
}

Tensor weight_norm_gradient(const Tensor& dw_hat, const Tensor& w) {
  const ScalarType type = dw_hat.scalar_type();
  const Tensor same = w.scalar_type() == type ? w : torch::stable::to(w, type);
  const Tensor gradient = in_layout(dw_hat, is_channels_last(w)), dw = empty_like(w, type);
  const Kernels& k = kernels(type_of(dw));
  const int64_t units = w.size(0), columns = units == 0 ? 0 : w.numel() / units;
  const void *from = gradient.data_ptr(), *weight = same.data_ptr();
  void* to = dw.data_ptr();
  in_parallel(units, columns, [&](int64_t begin, int64_t end) {
    k.weight_norm_backward(from, weight, to, columns, begin, end);
  });
  return type == w.scalar_type() ? dw : torch::stable::to(dw, w.scalar_type());
}

}  // namespace bcos::cpu
