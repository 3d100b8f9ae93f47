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

namespace {

int64_t plane_blocks(const Layout& l) { return l.images * l.groups * ((l.pixels + kBlock - 1) / kBlock); }

// f(first image, one past the last). By images where there are enough of them: their maps stay in the cache from step to
// step, and the threads are woken once.
template <class F>
bool by_images(int64_t images, int64_t elements_per_image, const F& f) {
  if (images < torch::stable::get_num_threads()) return false;
  in_parallel(images, elements_per_image, f);
  return true;
}

void sum_squares(const void* x, void* map, Type type, const Layout& l, int64_t first, int64_t last) {
  const Kernels& k = kernels(type);
  l.rows ? k.sum_squares_rows(x, map, l, first * l.pixels, last * l.pixels)
         : k.sum_squares_planes(x, map, l, first * l.groups, last * l.groups);
}

void scale_images(const ScaleArguments& s, Type type, int64_t first, int64_t last) {
  const Kernels& k = kernels(type);
  const Layout& l = s.layout;
  const int64_t blocks = l.groups * ((l.pixels + kBlock - 1) / kBlock);
  l.rows ? k.scale_rows(s, first * l.pixels, last * l.pixels) : k.scale_planes(s, first * blocks, last * blocks);
}

// Several groups with channels innermost.
bool by_groups(const Layout& l) { return l.rows && l.groups > 1; }

// Norms of the windows of images [first, last), from their map or, with a channel a group, from x.
void group_norms(const void* x, void* map, void* n, Type type, const Layout& l, const Window& w, int64_t first, int64_t last) {
  const Kernels& k = kernels(type);
  const bool of_x = l.channels == l.groups;
  if (!of_x) k.sum_squares_rows(x, map, l, first * l.pixels, last * l.pixels);
  const Scratch sums(wide_bytes(w.width * l.groups, type));
  k.window_norm_rows(
      of_x ? x : map, of_x, n, sums.get(), w, l.groups, first * w.out_height, last * w.out_height);
}

struct Maps {
  Scratch map, sums;
  Maps(const Layout& l, const Window& w, Type type)
      : map(wide_bytes(l.images * l.groups * l.pixels, type)),
        sums(wide_bytes(l.images * l.groups * w.height * w.out_width, type)) {}
};

}  // namespace

void window_norms(const void* x, const void* squares, void* n, Type type, const Layout& l, const Window& w) {
  const Kernels& k = kernels(type);
  if (squares != nullptr) {
    const int64_t work = (w.height + w.out_height) * w.out_width * w.kernel[1];
    const Scratch sums(wide_bytes(l.images * w.height * w.out_width, type));
    return in_parallel(l.images, work, [&](int64_t begin, int64_t end) {
      k.window_norm(squares, n, sums.get(), w, begin, end);
    });
  }
  if (by_groups(l)) {
    const Scratch map(wide_bytes(l.channels == l.groups ? 0 : l.images * l.groups * l.pixels, type));
    return in_parallel(l.images, l.pixels * l.channels, [&](int64_t first, int64_t last) {
      group_norms(x, map.get(), n, type, l, w, first, last);
    });
  }
  if (l.rows && l.groups == 1 && is_one_pixel(w)) return row_norms(x, n, type, l.images * l.pixels, l.channels, false);
  const int64_t maps = l.images * l.groups;
  const Maps m(l, w, type);
  if (l.rows) {
    in_parallel(l.images * l.pixels, l.channels, [&](int64_t begin, int64_t end) {
      k.sum_squares_rows(x, m.map.get(), l, begin, end);
    });
  } else {
    in_parallel(maps, l.pixels * l.channels / l.groups, [&](int64_t begin, int64_t end) {
      k.sum_squares_planes(x, m.map.get(), l, begin, end);
    });
  }
  in_parallel(maps, (w.height + w.out_height) * w.out_width * w.kernel[1], [&](int64_t begin, int64_t end) {
    k.window_norm(m.map.get(), n, m.sums.get(), w, begin, end);
  });
}

void window_norms_and_scale(
    const void* x, const void* squares, void* n, const ScaleArguments& s, Type type, const Layout& l, const Window& w) {
  const Maps m(l, w, type);
  const int64_t elements = l.pixels * l.channels + s.layout.pixels * s.layout.channels * s.max_out;
  const bool done = by_images(l.images, elements, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      if (by_groups(l)) {
        group_norms(x, m.map.get(), n, type, l, w, i, i + 1);
        scale_images(s, type, i, i + 1);
        continue;
      }
      if (squares == nullptr) sum_squares(x, m.map.get(), type, l, i, i + 1);
      kernels(type).window_norm(squares == nullptr ? m.map.get() : squares, n, m.sums.get(), w, i * l.groups, (i + 1) * l.groups);
      scale_images(s, type, i, i + 1);
    }
  });
  if (done) return;
  window_norms(x, squares, n, type, l, w);
  scale(s, type);
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

}  // namespace

void add_norm_gradient(void* dx, const void* x, const void* q, Type type, const Layout& l, const Window& w) {
  if (is_one_pixel(w)) return add_map(dx, x, q, type, l);
  const Kernels& k = kernels(type);
  if (by_groups(l)) {
    return in_parallel(l.images * w.height, w.width * l.channels, [&](int64_t begin, int64_t end) {
      const Scratch sums(wide_bytes((w.out_width + w.width) * l.groups, type));
      k.window_spread_rows(q, dx, x, sums.get(), w, l, begin, end);
    });
  }
  const Maps m(l, w, type);
  void* map = m.map.get();
  const bool done = by_images(l.images, l.pixels * l.channels, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      k.window_spread(q, map, m.sums.get(), w, i * l.groups, (i + 1) * l.groups);
      l.rows ? k.add_norm_term_rows(dx, dx, x, map, l, i * l.pixels, (i + 1) * l.pixels)
             : k.add_norm_term_planes(dx, dx, x, map, l, i * l.channels, (i + 1) * l.channels);
    }
  });
  if (done) return;
  in_parallel(l.images * l.groups, (w.height + w.out_height) * w.out_width * w.kernel[1], [&](int64_t begin, int64_t end) {
    k.window_spread(q, map, m.sums.get(), w, begin, end);
  });
  add_map(dx, x, map, type, l);
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
