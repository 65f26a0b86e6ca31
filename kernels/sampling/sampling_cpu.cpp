#include "sampling.h"

#include <cstring>

#include "csrc/runtime/parallel.h"
#include "csrc/simd/simd.h"

namespace fastlm {
namespace FASTLM_ISA {
namespace {

constexpr int64_t kBlock = 128;           // elements that share a maximum in the scan, and a mass in the draw
constexpr int64_t kFew = 256;             // elements up to which a threshold is found by bisection alone
constexpr double kSlack = 1.0 / 1048576;  // masses this close, relatively, count as equal: float32 weights cannot tell them apart

// Eight float64 lanes on every instruction set: the same order of summation, hence the same bits.
typedef double Lanes __attribute__((vector_size(64)));
typedef float Narrow __attribute__((vector_size(32)));
typedef int32_t NarrowBits __attribute__((vector_size(32)));

int64_t padded(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }
int32_t bits_of(float x) {
    int32_t i;
    std::memcpy(&i, &x, sizeof i);
    return i;
}
float float_of(int32_t i) {
    float x;
    std::memcpy(&x, &i, sizeof x);
    return x;
}
// Integers in the order of the floats; its own inverse.
int32_t ordered(int32_t i) { return i ^ ((i >> 31) & 0x7FFFFFFF); }

// e^x for x <= 0 by multiplications and additions alone, not fused: the same bits on every instruction set and in NumPy. 2 ulp.
// 0 below -87, where float32 would be subnormal.
FASTLM_INLINE vf weight(vf x) {
    const vf clamped = max(x, set(-88.0f));
    const vf n = round(clamped * set(1.44269504f));
    const vf r = (clamped - n * set(0.693145751953125f)) - n * set(1.42860682e-6f);
    vf p = set(1.38888889e-3f);
    p = p * r + set(8.33333333e-3f);
    p = p * r + set(4.16666667e-2f);
    p = p * r + set(1.66666667e-1f);
    p = p * r + set(0.5f);
    p = ((p * r) * r + r) + set(1.0f);
    return select(lt(x, set(-87.0f)), zero(), as_float(addi(as_int(p), shl<23>(to_int(n)))));
}

struct Workspace {
    float* row;       // (padded V) logits after the repetition penalty
    float* e;         // (padded V) weights exp(z - max)
    float* value;     // (padded V) candidates
    int32_t* index;   // (padded V) where they stand in the vocabulary
    int32_t* member;  // (padded V) elements of one bucket
    float* most;      // (padded V / 16) maximum of each block
    double* mass;     // (padded V / kBlock) cumulative mass of the blocks
    double* bucket;   // (4096,)

    explicit Workspace(int64_t V) {
        const int64_t n = padded(V) + kBlock;
        char* p = static_cast<char*>(scratch(size_t(n * (5 * 4) + n / 16 * 4 + n / kBlock * 8 + 4096 * 8)));
        bucket = reinterpret_cast<double*>(p);
        mass = bucket + 4096;
        row = reinterpret_cast<float*>(mass + n / kBlock);
        e = row + n;
        value = e + n;
        index = reinterpret_cast<int32_t*>(value + n);
        member = index + n;
        most = reinterpret_cast<float*>(member + n);
    }
};

// The maximum of each block and of all; false where there is a nan. `block` is a multiple of 16.
bool scan(float* most, float* greatest, const float* x, int64_t n, int64_t block) {
    float top = -INFINITY;
    vf suspect = zero();
    for (int64_t begin = 0; begin < n; begin += block, ++most) {
        const float* p = x + begin;
        float tail[kBlock];
        if (n - begin < block) {
            for (int64_t i = 0; i < block; ++i) tail[i] = begin + i < n ? p[i] : -INFINITY;
            p = tail;
        }
        vf m = load(p), sum = m;  // a nan stays in a sum, and a maximum may drop it
        for (int64_t i = W; i < block; i += W) {
            const vf v = load(p + i);
            m = max(m, v);
            sum = sum + v;
        }
        *most = reduce_max(m);
        top = *most > top ? *most : top;
        suspect = select(is_nan(sum), sum, suspect);
    }
    *greatest = top;
    if (!any(is_nan(suspect))) return true;
    for (int64_t i = 0; i < n; ++i)
        if (x[i] != x[i]) return false;
    return true;  // inf - inf, or sums that overflowed
}

// How many of n floats are at least t.
int64_t count_from(const float* x, int64_t n, float t) {
    const vf bound = set(t), one = set(1.0f);
    int64_t count = 0;
    for (int64_t begin = 0; begin < n; begin += int64_t(1) << 22) {  // exact in float32
        const int64_t end = n - begin < (int64_t(1) << 22) ? n : begin + (int64_t(1) << 22);
        vf a = zero();
        int64_t i = begin;
        for (; i + W <= end; i += W) a = a + select(le(bound, load(x + i)), one, zero());
        count += int64_t(reduce_add(a));
        for (; i < end; ++i) count += x[i] >= t;
    }
    return count;
}

// A bound with at least k of n floats from it on: exactly k, or it is the k-th largest of floats with ties. No nan; 1 <= k <= n.
float threshold(const float* x, int64_t n, int64_t k, float greatest) {
    int64_t low = ordered(bits_of(-INFINITY)), high = int64_t(ordered(bits_of(greatest))) + 1;
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        const float t = float_of(ordered(int32_t(middle)));
        const int64_t count = count_from(x, n, t);
        if (count == k) return t;
        (count > k ? low : high) = middle;
    }
    return float_of(ordered(int32_t(low)));
}

// The elements of x whose x / temperature belongs to the k largest, ties at the k-th included, in index order: returns how many.
// At least k blocks have a maximum from t on, so the k-th largest element is not below t: only blocks that reach t are looked at.
int64_t candidates(const Workspace& w, const float* x, int64_t V, int64_t k, float temperature, float greatest, int64_t block) {
    const int64_t blocks = (V + block - 1) / block;
    const vf divisor = set(temperature);
    for (int64_t i = 0; i < blocks; i += W) store_n(w.most + i, load_n(w.most + i, blocks - i) / divisor, blocks - i);
    const float top = greatest / temperature;
    const float t = k <= blocks ? threshold(w.most, blocks, k, top) : -INFINITY;
    const vf bound = set(t);
    int64_t n = 0;
    for (int64_t b = 0; b < blocks; ++b) {
        if (w.most[b] < t) continue;
        const int64_t end = (b + 1) * block < V ? (b + 1) * block : V;
        for (int64_t i = b * block; i < end; i += W) {
            const vf z = load_n(x + i, end - i) / divisor;
            uint32_t found = bits(le(bound, z));
            if (end - i < W) found &= (1u << (end - i)) - 1u;
            float lane[W];
            if (found) store(lane, z);
            for (; found; found &= found - 1) {
                const int j = __builtin_ctz(found);
                w.value[n] = lane[j];
                w.index[n++] = int32_t(i + j);
            }
        }
    }
    if (n <= k) return n;
    const float exact = threshold(w.value, n, k, top);
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
        w.value[kept] = w.value[i];
        w.index[kept] = w.index[i];
        kept += w.value[i] >= exact;
    }
    return kept;
}

// Blocks are at least twice as many as k where that can be had.
int64_t block_for(int64_t V, int64_t k) {
    int64_t block = kBlock;
    while (block > 16 && V / block < 2 * k) block /= 2;
    return block;
}

// e = exp(x / temperature - greatest / temperature), zeros up to the padded length.
void weights(float* e, const float* x, int64_t n, float temperature, float greatest) {
    const vf shift = set(greatest / temperature), divisor = set(temperature);
    const bool divide = temperature != 1.0f;
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        const vf v = load(x + i);
        store(e + i, weight((divide ? v / divisor : v) - shift));
    }
    if (i < n) store(e + i, weight(load_n(x + i, n - i) / divisor - shift));
    for (i = n; i < padded(n); ++i) e[i] = 0.0f;
}

// Sum of the e (n, padded with zeros) that are at least `from` and below `to`.
double mass(const float* e, int64_t n, float from, float to) {
    Lanes sum = {};
    for (int64_t i = 0; i < n; i += 8) {
        Narrow v;
        std::memcpy(&v, e + i, sizeof v);
        const NarrowBits in = (v >= from) & (v < to);
        sum += __builtin_convertvector(Narrow(NarrowBits(v) & in), Lanes);
    }
    return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
}

// The greatest t in [low, high) for which `below` plus the mass of the e in [low, t) stays within limit; all as float bits. The
// last of [low, high) is not tried: it is known to be too much.
float bisect(const float* e, int64_t n, int32_t low, int32_t high, double* below, double limit) {
    const float from = float_of(low);
    double sum = 0;
    while (high - low > 1) {
        const int32_t middle = low + (high - low) / 2;
        const double m = mass(e, n, from, float_of(middle));
        if (*below + m <= limit) low = middle, sum = m;
        else high = middle;
    }
    *below += sum;
    return float_of(low);
}

// bucket[(bits >> shift) - base] += x. Two tables would halve the wait where neighbours meet in a bucket, and leave L1.
__attribute__((noinline)) void add_masses(double* bucket, const float* x, int64_t n, int shift, int32_t base) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        const float a = x[i], b = x[i + 1], c = x[i + 2], d = x[i + 3];
        bucket[(bits_of(a) >> shift) - base] += double(a);
        bucket[(bits_of(b) >> shift) - base] += double(b);
        bucket[(bits_of(c) >> shift) - base] += double(c);
        bucket[(bits_of(d) >> shift) - base] += double(d);
    }
    for (; i < n; ++i) bucket[(bits_of(x[i]) >> shift) - base] += double(x[i]);
}

bool all_equal(const float* x, int64_t n) {
    int64_t i = 0;
    while (i < n && x[i] == x[0]) ++i;
    return n > 0 && i == n;
}

// Top-p: drops the lightest elements, in order of weight and then of index, as long as their mass stays within limit. Elements
// below the value returned are dropped; of those equal to it, the first ones are set to zero here. The last in that order always
// stays. Selection by radix on the bits of the weights, most significant first, where a bucket holds mass instead of a count.
float nucleus(const Workspace& w, int64_t n, double limit) {
    const float* e = w.e;
    int64_t members = -1;  // -1: all n
    double below = 0;
    int32_t prefix = 0;
    int shift = 31;
    float cut = 0;
    for (;;) {
        if ((members < 0 ? n : members) <= kFew) {
            const int32_t one = bits_of(1.0f);
            const int32_t high = shift == 31 ? one + 1 : (prefix + 1) << shift;
            const float* list = members < 0 ? e : w.value;
            cut = bisect(list, padded(members < 0 ? n : members), prefix << (shift == 31 ? 0 : shift), high > one ? one + 1 : high,
                         &below, limit);
            break;
        }
        const int width = shift == 31 ? 13 : 9, next = shift == 31 ? 18 : shift - 9;
        const int32_t base = shift == 31 ? 0 : prefix << width, last = bits_of(1.0f) >> next;
        const float* list = members < 0 ? e : w.value;
        const int64_t size = members < 0 ? n : members;
        const int64_t buckets = int64_t(1) << (shift == 31 ? 12 : 9);
        for (int64_t i = 0; i < buckets; ++i) w.bucket[i] = 0;
        add_masses(w.bucket, list, size, next, base);
        int32_t b = 0;
        while (base + b < last && b + 1 < buckets && below + w.bucket[b] <= limit) below += w.bucket[b++];
        prefix = base + b;
        shift = next;
        const float from = float_of(prefix << shift);
        const int32_t upper = (prefix + 1) << shift;
        int64_t found = 0;
        if (members < 0) {
            const vf low = set(from), high = set(float_of(upper));
            for (int64_t i = 0; i < padded(n); i += W) {
                const vf v = load(e + i);
                for (uint32_t in = bits(le(low, v)) & bits(lt(v, high)); in; in &= in - 1) {
                    const int64_t at = i + __builtin_ctz(in);
                    if (at >= n) break;
                    w.value[found] = e[at];
                    w.member[found++] = int32_t(at);
                }
            }
        } else {
            for (int64_t i = 0; i < members; ++i) {
                const float v = w.value[i];
                w.value[found] = v;
                w.member[found] = w.member[i];
                found += v >= from && v < float_of(upper);
            }
        }
        members = found;
        for (int64_t i = found; i < padded(found); ++i) w.value[i] = 0.0f;
        if (all_equal(w.value, found)) {
            cut = w.value[0];
            break;
        }
        if (shift == 0) {
            cut = from;
            break;
        }
    }
    int64_t ties = 0;
    const int64_t size = members < 0 ? n : members;
    for (int64_t i = 0; i < size; ++i) ties += (members < 0 ? e : w.value)[i] == cut;
    int64_t drop = int64_t((limit - below) / double(cut));
    if (drop > ties - (cut == 1.0f)) drop = ties - (cut == 1.0f);
    for (int64_t i = 0; i < size && drop > 0; ++i) {
        const int64_t at = members < 0 ? i : w.member[i];
        if (e[at] != cut) continue;
        w.e[at] = 0.0f;
        --drop;
    }
    return cut;
}

// Inverse of the cumulative distribution, in index order, over the e (n, padded) that are at least `cut`.
int64_t draw(const Workspace& w, int64_t n, float cut, double uniform) {
    double total = 0;
    const int64_t blocks = padded(n) / kBlock;
    for (int64_t b = 0; b < blocks; ++b) w.mass[b] = total += mass(w.e + b * kBlock, kBlock, cut, INFINITY);
    const double target = uniform * total;
    int64_t b = 0;
    while (b + 1 < blocks && !(w.mass[b] > target)) ++b;
    for (;; --b) {  // only rounding makes a block end before the target: then its last element is meant
        double sum = b ? w.mass[b - 1] : 0.0;
        int64_t last = -1;
        for (int64_t i = b * kBlock; i < (b + 1) * kBlock && i < n; ++i) {
            if (!(w.e[i] >= cut) || w.e[i] == 0.0f) continue;
            sum += double(w.e[i]);
            last = i;
            if (sum > target) return i;
        }
        if (last >= 0) return last;
    }
}

int32_t first_equal(const float* most, const float* x, int64_t n, float greatest) {
    int64_t b = 0;
    while (most[b] != greatest) ++b;
    int64_t i = b * kBlock;
    while (i < n && x[i] != greatest) ++i;
    return int32_t(i);
}

// The logits after the repetition penalty, Keskar et al. 2019, arXiv:1909.05858, section 4.1; null where an id is unknown.
const float* penalised(const Workspace& w, const Sample& p, int64_t b) {
    const float* x = p.logits + b * p.V;
    std::memcpy(w.row, x, size_t(p.V) * sizeof(float));
    for (int64_t i = p.previous_begin[b]; i < p.previous_begin[b + 1]; ++i) {
        const int32_t id = p.previous[i];
        if (id == -1) continue;
        if (id < 0 || id >= p.V) return nullptr;
        w.row[id] = x[id] < 0 ? x[id] * p.penalty : x[id] / p.penalty;  // from x: an id that occurs twice counts once
    }
    return w.row;
}

int32_t sample_row(const Sample& p, int64_t b) {
    const Workspace w(p.V);
    const float* x = p.previous ? penalised(w, p, b) : p.logits + b * p.V;
    if (!x) return kSampleBadPrevious;
    const bool some = p.top_k > 0 && p.top_k < p.V && p.temperature > 0;
    const int64_t block = some ? block_for(p.V, p.top_k) : kBlock;
    float greatest;
    if (!scan(w.most, &greatest, x, p.V, block)) return kSampleNan;
    if (greatest == -INFINITY) return kSampleNothing;
    if (!(p.uniform[b] >= 0 && p.uniform[b] < 1)) return kSampleBadUniform;
    if (p.temperature == 0.0f) return first_equal(w.most, x, p.V, greatest);
    if (greatest / p.temperature == INFINITY || greatest / p.temperature == -INFINITY) return kSampleInfinite;
    int64_t n = p.V;
    if (some) {
        n = candidates(w, x, p.V, p.top_k, p.temperature, greatest, block);
        weights(w.e, w.value, n, 1.0f, greatest / p.temperature);
    } else {
        weights(w.e, x, n, p.temperature, greatest);
    }
    float cut = 0.0f;
    if (p.top_p < 1) cut = nucleus(w, n, (1 - p.top_p) * mass(w.e, padded(n), 0.0f, INFINITY) * (1 + kSlack));
    const float floor = float(double(p.min_p) * (1 - kSlack));
    const int64_t at = draw(w, n, floor > cut ? floor : cut, p.uniform[b]);
    return some ? w.index[at] : int32_t(at);
}

void sample(const Sample& p) {
    parallel_for(p.B, 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) p.token[b] = sample_row(p, b);
    });
}

// Ascending, in place.
void heap_sort(uint64_t* a, int64_t n) {
    auto sift = [a](int64_t i, int64_t size) {
        const uint64_t x = a[i];
        for (int64_t child; (child = 2 * i + 1) < size; i = child) {
            child += child + 1 < size && a[child + 1] > a[child];
            if (a[child] <= x) break;
            a[i] = a[child];
        }
        a[i] = x;
    };
    for (int64_t i = n / 2; i-- > 0;) sift(i, n);
    for (int64_t size = n; size-- > 1;) {
        const uint64_t x = a[0];
        a[0] = a[size];
        a[size] = x;
        sift(0, size);
    }
}

void top_k_row(const TopK& p, int64_t r) {
    const Workspace w(p.N);
    const float* x = p.x + r * p.N;
    const int64_t block = block_for(p.N, p.k);
    float greatest;
    if (!scan(w.most, &greatest, x, p.N, block)) {
        p.indices[r * p.k] = kSampleNan;
        return;
    }
    const int64_t n = candidates(w, x, p.N, p.k, 1.0f, greatest, block);
    // One key orders by value, descending, and then by index, ascending. The row and its weights are not in use: 8 bytes an
    // element.
    auto* key = reinterpret_cast<uint64_t*>(w.row);
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t rank = uint32_t(ordered(bits_of(w.value[i] + 0.0f))) ^ 0x80000000u;  // -0 becomes 0
        key[i] = uint64_t(~rank) << 32 | uint32_t(w.index[i]);
    }
    heap_sort(key, n);
    for (int64_t i = 0; i < p.k; ++i) {
        const auto at = int32_t(key[i]);
        p.indices[r * p.k + i] = at;
        p.values[r * p.k + i] = x[at];
    }
}

void top_k(const TopK& p) {
    parallel_for(p.R, 1, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) top_k_row(p, r);
    });
}

void argmax(const Argmax& p) {
    parallel_for(p.R, p.N >= 16384 ? 1 : 16384 / p.N, [&](int64_t begin, int64_t end) {
        const Workspace w(p.N);
        for (int64_t r = begin; r < end; ++r) {
            const float* x = p.x + r * p.N;
            float greatest;
            if (!scan(w.most, &greatest, x, p.N, kBlock)) p.index[r] = kSampleNan;
            else if (p.token && greatest == -INFINITY) p.index[r] = kSampleNothing;
            else p.index[r] = first_equal(w.most, x, p.N, greatest);
        }
    });
}

}  // namespace

extern const SamplingKernels sampling_kernels = {sample, top_k, argmax};

}  // namespace FASTLM_ISA
}  // namespace fastlm
