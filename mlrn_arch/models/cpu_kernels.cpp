// 3x3 convolutions of float32 channels-last images by Winograd's F(4x4, 3x3) (Lavin and Gray, 2016),
// and GELU with its derivative. Compiled and called by cpu_kernels.py.
//
// A tile is 4x4 outputs, made from 6x6 inputs. In the transformed domain it is 36 numbers a channel,
// and the convolution is 36 products of matrices, (tiles, c) times (c, o): a quarter of the
// multiplications. A block of tiles goes through all the steps while it is in the cache.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16, COLUMNS = 4;
#else
constexpr int LANES = 8, COLUMNS = 2;
#endif
constexpr int ROWS = 6;      // of the product that registers hold at a time, COLUMNS vectors wide
constexpr int TILES = 24;    // in a block
typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef float Anywhere __attribute__((vector_size(LANES * 4), aligned(4)));

inline Vector load(const float* p) { return *(const Anywhere*)p; }
inline void store(float* p, Vector v) { *(Anywhere*)p = v; }
inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

struct Scratch {
    float* p;
    explicit Scratch(int64_t n) : p(new (std::align_val_t(64)) float[n]()) {}  // zeros
    ~Scratch() { ::operator delete[](p, std::align_val_t(64)); }
};

// The transforms along one side: of inputs (B^T), of outputs (A^T), and of their gradient (A).
inline void input_side(const Vector* d, Vector* o) {
    Vector a = d[4] - 4.f * d[2], b = d[3] - 4.f * d[1], c = d[4] - d[2], e = 2.f * (d[3] - d[1]);
    o[0] = 4.f * d[0] - 5.f * d[2] + d[4];
    o[1] = a + b;
    o[2] = a - b;
    o[3] = c + e;
    o[4] = c - e;
    o[5] = 4.f * d[1] - 5.f * d[3] + d[5];
}
inline void output_side(const Vector* m, Vector* o) {
    Vector p = m[1] + m[2], q = m[1] - m[2], r = m[3] + m[4], s = m[3] - m[4];
    o[0] = m[0] + p + r;
    o[1] = q + 2.f * s;
    o[2] = p + 4.f * r;
    o[3] = q + 8.f * s + m[5];
}
inline void gradient_side(const Vector* y, Vector* o) {
    Vector p = y[0] + y[2], q = y[1] + y[3], r = y[0] + 4.f * y[2], s = 2.f * y[1] + 8.f * y[3];
    o[0] = y[0];
    o[1] = p + q;
    o[2] = p - q;
    o[3] = r + s;
    o[4] = r - s;
    o[5] = y[3];
}

struct Image {
    const float* p;
    int64_t n, h, w, c;
    int64_t rows() const { return (h + 3) / 4; }
    int64_t columns() const { return (w + 3) / 4; }
    int64_t tiles() const { return n * rows() * columns(); }
    int64_t blocks() const { return (tiles() + TILES - 1) / TILES; }
};

// 36 numbers per channel of each tile of a block: to[36][TILES][stride]. SIDE 6 is the input with
// its surroundings, SIDE 4 the gradient of the output.
template <int SIDE>
void transform(const Image& x, int64_t block, float* to, int64_t stride) {
    const int64_t first = block * TILES, last = std::min(first + TILES, x.tiles());
    for (int64_t t = first; t < last; t++) {
        const int64_t column = t % x.columns(), row = t / x.columns() % x.rows();
        const int64_t top = 4 * row - (SIDE == 6), left = 4 * column - (SIDE == 6);
        const float* image = x.p + t / x.columns() / x.rows() * x.h * x.w * x.c;
        const bool inside = top >= 0 && left >= 0 && top + SIDE <= x.h && left + SIDE <= x.w;
        for (int64_t c0 = 0; c0 < x.c; c0 += LANES) {
            const int64_t c = std::min(c0, x.c - LANES);
            Vector half[6 * SIDE], d[SIDE], o[6];
            for (int j = 0; j < SIDE; j++) {
                for (int i = 0; i < SIDE; i++) {
                    const int64_t a = top + i, b = left + j;
                    d[i] = inside || (a >= 0 && a < x.h && b >= 0 && b < x.w)
                               ? load(image + (a * x.w + b) * x.c + c)
                               : Vector{};
                }
                SIDE == 6 ? input_side(d, o) : gradient_side(d, o);
                for (int i = 0; i < 6; i++) half[i * SIDE + j] = o[i];
            }
            for (int i = 0; i < 6; i++) {
                SIDE == 6 ? input_side(half + i * SIDE, o) : gradient_side(half + i * SIDE, o);
                for (int j = 0; j < 6; j++)
                    store(to + ((i * 6 + j) * TILES + t - first) * stride + c, o[j]);
            }
        }
    }
}

// c[R][V vectors] (+)= sum over k of a[k * step + r * lead] * b[k][V vectors]
template <int R, int V, bool ADD>
inline void product(const float* a, int64_t lead, int64_t step, const float* b, float* c, int64_t width,
                    int64_t depth) {
    Vector sum[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sum[r][v] = ADD ? load(c + r * width + v * LANES) : Vector{};
    for (int64_t k = 0; k < depth; k++) {
        Vector bk[V];
        for (int v = 0; v < V; v++) bk[v] = load(b + k * width + v * LANES);
        for (int r = 0; r < R; r++) {
            const float ak = a[k * step + r * lead];
            for (int v = 0; v < V; v++) sum[r][v] += ak * bk[v];
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(c + r * width + v * LANES, sum[r][v]);
}

template <int V, bool ADD>
inline void strip(const float* a, int64_t lead, int64_t step, const float* b, float* c, int64_t width,
                  int64_t depth, int64_t rows) {
    int64_t r = 0;
    for (; r + ROWS <= rows; r += ROWS)
        product<ROWS, V, ADD>(a + r * lead, lead, step, b, c + r * width, width, depth);
    for (; r + 4 <= rows; r += 4) product<4, V, ADD>(a + r * lead, lead, step, b, c + r * width, width, depth);
    for (; r < rows; r++) product<1, V, ADD>(a + r * lead, lead, step, b, c + r * width, width, depth);
}

// c[rows][width] (+)= a b, where b is [depth][width] and width a multiple of LANES
template <bool ADD>
void multiply(const float* a, int64_t lead, int64_t step, const float* b, float* c, int64_t width,
              int64_t depth, int64_t rows) {
    int64_t v = 0;
    for (; v + COLUMNS * LANES <= width; v += COLUMNS * LANES)
        strip<COLUMNS, ADD>(a, lead, step, b + v, c + v, width, depth, rows);
    for (; v < width; v += LANES) strip<1, ADD>(a, lead, step, b + v, c + v, width, depth, rows);
}

}  // namespace

extern "C" {

int lanes() { return LANES; }

// y[n][h][w][o] = x[n][h][w][c] convolved with u[36][c][padded(o)], the transformed weight, + bias[o],
// which may be null; c and o are at least lanes()
void conv3x3(const float* x, const float* u, const float* bias, float* y, int64_t n, int64_t h, int64_t w,
             int64_t c, int64_t o, int threads) {
    const Image in{x, n, h, w, c};
    const int64_t from = padded(c), to = padded(o);
#pragma omp parallel num_threads(threads)
    {
        Scratch v(36 * TILES * from), m(36 * TILES * to);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < in.blocks(); block++) {
            const int64_t first = block * TILES, last = std::min(first + TILES, in.tiles());
            transform<6>(in, block, v.p, from);
            for (int k = 0; k < 36; k++)
                multiply<false>(v.p + k * TILES * from, from, 1, u + k * c * to, m.p + k * TILES * to, to, c,
                                TILES);
            for (int64_t t = first; t < last; t++) {
                const int64_t top = t / in.columns() % in.rows() * 4, left = t % in.columns() * 4;
                float* image = y + t / in.columns() / in.rows() * h * w * o;
                for (int64_t o0 = 0; o0 < o; o0 += LANES) {
                    const int64_t at = std::min(o0, o - LANES);
                    const Vector b = bias ? load(bias + at) : Vector{};
                    Vector half[24], d[6], out[4];
                    for (int j = 0; j < 6; j++) {
                        for (int i = 0; i < 6; i++) d[i] = load(m.p + ((i * 6 + j) * TILES + t - first) * to + at);
                        output_side(d, out);
                        for (int i = 0; i < 4; i++) half[i * 6 + j] = out[i];
                    }
                    for (int i = 0; i < 4 && top + i < h; i++) {
                        output_side(half + i * 6, out);
                        for (int j = 0; j < 4 && left + j < w; j++)
                            store(image + ((top + i) * w + left + j) * o + at, out[j] + b);
                    }
                }
            }
        }
    }
}

// parts[threads][36][c][padded(o)], all zero: their sum is the gradient of the transformed weight;
// gy[n][h][w][o] is that of the output. The sum is left to the caller, for the same order every time.
void conv3x3_weight(const float* x, const float* gy, float* parts, int64_t n, int64_t h, int64_t w,
                    int64_t c, int64_t o, int threads) {
    const Image in{x, n, h, w, c}, out{gy, n, h, w, o};
    const int64_t from = padded(c), to = padded(o), blocks = in.blocks();
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; thread++) {
        Scratch v(36 * TILES * from), d(36 * TILES * to);
        for (int64_t block = blocks * thread / threads; block < blocks * (thread + 1) / threads; block++) {
            const int64_t tiles = std::min<int64_t>(TILES, in.tiles() - block * TILES);
            transform<6>(in, block, v.p, from);
            transform<4>(out, block, d.p, to);
            for (int k = 0; k < 36; k++)
                multiply<true>(v.p + k * TILES * from, 1, from, d.p + k * TILES * to,
                               parts + (thread * 36 + k) * c * to, to, tiles, c);
        }
    }
}

// y = GELU(x), exact to 5e-7 (erf by Abramowitz and Stegun, 7.1.26), and d its derivative
void gelu(const float* x, float* y, float* d, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t start = 0; start < n; start += 4096) {
        const int64_t end = std::min(start + 4096, n);
#pragma GCC ivdep
        for (int64_t i = start; i < end; i++) {
            const float v = x[i], e = std::exp(-0.5f * v * v);
            const float t = 1.f / (1.f + 0.2316418895f * std::fabs(v));  // 0.3275911 / sqrt(2)
            const float tail =
                0.5f * e * t *
                (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
            const float phi = v >= 0 ? 1 - tail : tail;
            y[i] = v * phi;
            d[i] = phi + v * e * 0.3989422804f;
        }
    }
}
}
