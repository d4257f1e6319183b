// The matrix product behind every kernel: C = A B or C += A B. Elements of A are broadcast to all lanes. B and C are
// read by vectors along their rows.
//
// A register tile of C has up to kTileRows rows and kTileVectors vectors. Its sums stay in registers over the summed
// index. In ordinary arithmetic the summed index is cut into pieces of kSteps, and each piece is added to C. With AMX,
// whole 16 x 16 tiles are multiplied by AMX, and the remaining rows and steps as without it.
#pragma once

#include <algorithm>

#include "simd.h"

namespace fastprefix {

// Base of the ways to multiply that do not use AMX. Their threads have nothing to set up.
struct Untiled {
  struct Unit {};
  static constexpr bool tiled = false;
};

// Ordinary arithmetic. This class and the two below define how operands are multiplied:
// - `pair` is how many neighbors along the summed index are adjacent in memory: 1, or 2 for bfloat16 dot products.
// - `tiled` is true if AMX is used.
// - `Unit` is an object that each thread holds while it multiplies.
template <class A>
struct Plain : Untiled {
  using Operand = A;
  using Accumulator = A;
  static constexpr int pair = 1;
  static Vec<A> broadcast(const A* a) { return splat(*a); }
  static Vec<A> vector(const A* b) { return load(b); }
  static Vec<A> multiply_add(Vec<A> c, Vec<A> a, Vec<A> b) { return a * b + c; }
};

#if defined(FASTPREFIX_BFLOAT16_PAIRS)
// Instructions that multiply pairs of bfloat16 and add both products to a float32 sum.
struct Bfloat16Pairs : Untiled {
  using Operand = BFloat16;
  using Accumulator = float;
  static constexpr int pair = 2;
  static Vec<float> broadcast(const BFloat16* a) {
    float both;
    std::memcpy(&both, a, sizeof(both));
    return splat_bits(both);
  }
  static Vec<float> vector(const BFloat16* b) { return load(reinterpret_cast<const float*>(b)); }
#if defined(__AVX512BF16__)
  static Vec<float> multiply_add(Vec<float> c, Vec<float> a, Vec<float> b) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
  }

 private:
  static Vec<float> splat_bits(float both) { return (Vec<float>)_mm512_set1_ps(both); }
#else
  static Vec<float> multiply_add(Vec<float> c, Vec<float> a, Vec<float> b) {
    return (Vec<float>)vbfdotq_f32((float32x4_t)c, (bfloat16x8_t)a, (bfloat16x8_t)b);
  }

 private:
  static Vec<float> splat_bits(float both) { return (Vec<float>)vdupq_n_f32(both); }
#endif
};
#endif

#if defined(__AMX_BF16__)
// The AMX tile configuration: eight tiles of 16 rows, 64 bytes per row.
struct TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
alignas(64) inline constexpr TileShapes kWholeTiles;

// The same products with AMX, 16 x 16 sums per tile. Rows and steps that do not fill a tile use Bfloat16Pairs.
struct Bfloat16Tiles : Bfloat16Pairs {
  static constexpr bool tiled = true;
  static constexpr int64_t kSize = 16;  // rows of a tile, and 32-bit words per row

  // Configures the tiles of the current thread.
  struct Unit {
    Unit() { _tile_loadconfig(&kWholeTiles); }
    ~Unit() { _tile_release(); }
    Unit(const Unit&) = delete;
  };

  // Compute R x V tiles of C (+)= A B over `steps` pairs, a multiple of kSize. Tiles 0 to 3 hold C, 4 and 5 hold A, and
  // 6 and 7 hold B. Strides are in elements.
  template <int R, int V>
  static void multiply(
      const BFloat16* a,
      int64_t lda,
      const BFloat16* b,
      int64_t ldb,
      float* c,
      int64_t ldc,
      int64_t steps,
      bool accumulate) {
    constexpr int64_t pairs = kSize * pair;
    // The compiler does not know that tile loads read memory, so finish all stores first.
    asm volatile("" ::: "memory");
    if (accumulate) {
      _tile_loadd(0, c, ldc * 4);
      if constexpr (V == 2) _tile_loadd(1, c + kSize, ldc * 4);
      if constexpr (R == 2) _tile_loadd(2, c + kSize * ldc, ldc * 4);
      if constexpr (R == 2 && V == 2) _tile_loadd(3, c + kSize * ldc + kSize, ldc * 4);
    } else {
      _tile_zero(0);
      if constexpr (V == 2) _tile_zero(1);
      if constexpr (R == 2) _tile_zero(2);
      if constexpr (R == 2 && V == 2) _tile_zero(3);
    }
    for (; steps > 0; steps -= kSize, a += pairs, b += kSize * ldb) {
      _tile_loadd(4, a, lda * 2);
      _tile_loadd(6, b, ldb * 2);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (V == 2) _tile_loadd(7, b + pairs, ldb * 2);
      if constexpr (V == 2) _tile_dpbf16ps(1, 4, 7);
      if constexpr (R == 2) _tile_loadd(5, a + kSize * lda, lda * 2);
      if constexpr (R == 2) _tile_dpbf16ps(2, 5, 6);
      if constexpr (R == 2 && V == 2) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, ldc * 4);
    if constexpr (V == 2) _tile_stored(1, c + kSize, ldc * 4);
    if constexpr (R == 2) _tile_stored(2, c + kSize * ldc, ldc * 4);
    if constexpr (R == 2 && V == 2) _tile_stored(3, c + kSize * ldc + kSize, ldc * 4);
  }
};
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 6, kTileVectors = 4;  // 24 of 32 registers hold sums
#else
constexpr int kTileRows = 6, kTileVectors = 2;  // 12 of 16
#endif

// One product, C[r, v] (+)= sum_k A[r, k] B[k, v]. A step is `pair` elements of the summed index. All strides are in
// elements: `rs` between rows of A, `ks` between steps of A, `ldb` between steps of B, and `ldc` between rows of C.
template <class Manner>
struct Product {
  using Operand = typename Manner::Operand;
  using A = typename Manner::Accumulator;

  const Operand* a;
  int64_t rs, ks;
  const Operand* b;
  int64_t ldb;
  A* c;
  int64_t ldc;
  int64_t steps;
  bool accumulate;

  // Compute a register tile of R rows and V vectors. Sums start at 0 and are added to C at the end, since short sums
  // have smaller rounding errors than one long sum that starts at C.
  template <int R, int V>
  void tile(int64_t row, int64_t vector) const {
    const Operand* ap = a + row * rs;
    const Operand* bp = b + vector * kLanes<A> * Manner::pair;
    A* cp = c + row * ldc + vector * kLanes<A>;
    Vec<A> sums[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] = Vec<A>{};
    for (int64_t k = 0; k < steps; ++k, ap += ks, bp += ldb) {
      Vec<A> bs[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) bs[v] = Manner::vector(bp + v * kLanes<A> * Manner::pair);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        Vec<A> broadcast = Manner::broadcast(ap + r * rs);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[r][v] = Manner::multiply_add(sums[r][v], broadcast, bs[v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        A* at = cp + r * ldc + v * kLanes<A>;
        store(at, accumulate ? load(at) + sums[r][v] : sums[r][v]);
      }
  }

  // Compute `rows` rows of a column of tiles that is V vectors wide.
  template <int V>
  void rows_of(int64_t row, int64_t rows, int64_t vector) const {
    for (; rows >= kTileRows; rows -= kTileRows, row += kTileRows) tile<kTileRows, V>(row, vector);
    switch (rows) {
      case 5: return tile<5, V>(row, vector);
      case 4: return tile<4, V>(row, vector);
      case 3: return tile<3, V>(row, vector);
      case 2: return tile<2, V>(row, vector);
      case 1: return tile<1, V>(row, vector);
      default: return;
    }
  }

  // Steps per piece of a long sum. No wider accumulator is used, and a sum of pieces rounds less than one long sum.
  static constexpr int64_t kSteps = Manner::pair == 1 ? 32 : std::numeric_limits<int64_t>::max();

  // Compute `rows` rows and `columns` columns of C. `columns` is a multiple of kLanes.
  void run(int64_t rows, int64_t columns) const {
    if constexpr (Manner::tiled) {
      if (ks == Manner::pair) return run_tiles(rows, columns);
    }
    Product piece = *this;
    for (int64_t done = 0; done < steps || done == 0; done += piece.steps) {
      piece.steps = std::min(kSteps, steps - done);
      piece.run_piece(rows, columns);
      if (piece.steps == 0) return;
      piece.a += piece.steps * ks;
      piece.b += piece.steps * ldb;
      piece.accumulate = true;
    }
  }

 private:
  // Multiply whole AMX tiles, in blocks of up to 2 x 2, then the remaining steps and rows without AMX.
  void run_tiles(int64_t rows, int64_t columns) const {
    constexpr int64_t n = Manner::kSize;
    int64_t whole_rows = rows / n * n, whole_steps = steps / n * n;
    if (whole_rows == 0 || whole_steps == 0) return run_piece(rows, columns);
    for (int64_t column = 0; column < columns; column += 2 * n)
      for (int64_t row = 0; row < whole_rows; row += 2 * n) {
        bool two_rows = row + n < whole_rows, two_columns = column + n < columns;
        auto multiply = two_rows ? (two_columns ? Manner::template multiply<2, 2> : Manner::template multiply<2, 1>)
                                 : (two_columns ? Manner::template multiply<1, 2> : Manner::template multiply<1, 1>);
        multiply(
            a + row * rs, rs, b + column * Manner::pair, ldb, c + row * ldc + column, ldc, whole_steps, accumulate);
      }
    Product rest = *this;
    if (whole_steps < steps) {
      rest.a += whole_steps * ks;
      rest.b += whole_steps * ldb;
      rest.steps -= whole_steps;
      rest.accumulate = true;
      rest.run_piece(whole_rows, columns);
    }
    if (whole_rows < rows) {
      rest = *this;
      rest.a += whole_rows * rs;
      rest.c += whole_rows * ldc;
      rest.run_piece(rows - whole_rows, columns);
    }
  }

  // Compute the product in register tiles. The steps are not divided.
  void run_piece(int64_t rows, int64_t columns) const {
    int64_t vectors = columns / kLanes<A>;
    for (int64_t vector = 0, width; vector < vectors; vector += width) {
      // Divide the vectors evenly: five vectors are 3 + 2, not 4 + 1, since a narrow tile reuses A less.
      int64_t left = vectors - vector, tiles = (left + kTileVectors - 1) / kTileVectors;
      width = (left + tiles - 1) / tiles;
      if (width == 1) rows_of<1>(0, rows, vector);
      if (width == 2) rows_of<2>(0, rows, vector);
      if constexpr (kTileVectors > 2) {
        if (width == 3) rows_of<3>(0, rows, vector);
        if (width == 4) rows_of<4>(0, rows, vector);
      }
    }
  }
};

}  // namespace fastprefix
