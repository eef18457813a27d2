// Hopper's asynchronous machines: barriers in shared memory, the engine that copies tiles, and products of a warpgroup.
//
// Both machines do their work at some moment between the start and the end that somebody waits for. As with cp.async, whose
// copies may be a barrier's, too, it is as late as is legal in the forward schedule, as early in reverse, and else at random. Accumulators are NaN while
// their product is under way, so that whoever reads one too early sees it.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>

#include "scheduler.h"

namespace emulator {

// ---- barriers

struct Barrier {
    int agent;  // its copies, to the checker
    int arrivals, pending;
    int bytes;  // expected and not here yet
    int phase;  // how many have ended
    int waited;  // how many of those somebody has waited for
    int initialiser;
    bool published;  // to the copy engine
    Knowledge gathered;  // by those who have arrived in this phase
    Knowledge released;  // to those who wait
};

struct TileCopy {
    char *to;
    TileMap map;
    int row, column;
    Barrier *barrier;
    int phase;  // of the barrier, which must not end without it
    Where where;

    int bytes() const { return map.box_rows * map.box_columns * 2; }
};

struct Arrival {  // of a thread that goes on, when its copies are done
    int thread;
    std::vector<Copy> copies;
    Barrier *barrier;
    Knowledge knowledge;
    Where where;
};

struct Unheeded {  // a copy, done or on its way, that somebody must wait for
    const Barrier *barrier;
    int phase;
    const char *what;
    Where where;
};

static std::map<void *, Barrier> barriers;  // of the running block
static std::vector<TileCopy> copies;        // on their way, oldest first
static std::vector<Arrival> arrivals;       // to come, oldest first
static std::vector<Unheeded> unheeded;

static Barrier &barrier_at(void *p, Where where) {
    touch(p, 8, Access::atomic, where);
    const auto found = barriers.find(p);
    if (found == barriers.end()) fail("mbarrier", where, "there is no barrier here: mbarrier_init sets it up");
    return found->second;
}

void init_barrier(void *p, int arrivals, Where where) {
    if ((uintptr_t)p % 8) fail("misaligned", where, "a barrier lies at a multiple of 8 bytes");
    if (arrivals < 1 || arrivals >= 1 << 20) fail("mbarrier", where, "a phase has 1 to 2^20 - 1 arrivals, not %d", arrivals);
    touch(p, 8, Access::write, where);
    barriers[p] = {new_agent(), arrivals, arrivals, 0, 0, 0, current, false, {}, {}};
}

void publish_barriers() {
    for (auto &[place, barrier] : barriers)
        if (barrier.initialiser == current) barrier.published = true;
}

static void end_phase_if_complete(Barrier &barrier) {
    if (barrier.pending || barrier.bytes) return;
    for (const TileCopy &copy : copies)
        if (copy.barrier == &barrier && copy.phase == barrier.phase)
            fail("in flight", copy.where, "the phase ends before this tile is here: its %d bytes were not expected", copy.bytes());
    barrier.phase++;
    barrier.pending = barrier.arrivals;
    merge(barrier.released, barrier.gathered);
    if ((int)barrier.released.size() <= barrier.agent) barrier.released.resize(barrier.agent + 1);
    barrier.released[barrier.agent] = barrier.phase;
    barrier.gathered.clear();
}

static void arrive_at(Barrier &barrier, int bytes, const Knowledge &knowledge, Where where) {
    if (!barrier.pending) fail("mbarrier", where, "all %d arrivals of the phase have come already", barrier.arrivals);
    merge(barrier.gathered, knowledge);
    barrier.bytes += bytes;
    barrier.pending--;
    end_phase_if_complete(barrier);
}

void arrive(void *p, int bytes, Where where) { arrive_at(barrier_at(p, where), bytes, release(), where); }

// A thread's copies are done in any order, but an arrival is for all that came before it, hence after the arrivals that did.
static void finish_oldest_arrival(int thread) {
    const auto oldest = std::find_if(arrivals.begin(), arrivals.end(), [=](const Arrival &a) { return a.thread == thread; });
    Arrival arrival = *oldest;
    arrivals.erase(oldest);
    for (Copy &copy : arrival.copies) finish(copy);
    arrive_at(*arrival.barrier, 0, arrival.knowledge, arrival.where);
}

// From here on the copies are the barrier's: no wait_for_copies of the thread is meant for them.
void arrive_when_copied(void *p, Where where) {
    Barrier &barrier = barrier_at(p, where);
    arrivals.push_back({current, {}, &barrier, release(), where});
    arrivals.back().copies.swap(threads[current].copies);
    unheeded.push_back({&barrier, barrier.phase, "this copy", where});
    if (options.schedule == reverse || (options.schedule == shuffled && random_bits() % 2)) finish_oldest_arrival(current);
}

struct Wait {
    Barrier *barrier;
    unsigned parity;
};

void wait_for_phase(void *p, unsigned parity, Where where) {
    Wait wait = {&barrier_at(p, where), parity};
    wait_until([](void *w) { return (((Wait *)w)->barrier->phase & 1u) != ((Wait *)w)->parity; }, &wait, where);
    learn(wait.barrier->released);
    wait.barrier->waited = wait.barrier->phase;
}

// ---- tiles

// Where the 128-byte swizzle puts a byte of shared memory: bits 7 to 9, the row, are added to bits 4 to 6, the chunk.
static char *swizzled(char *p) {
    const size_t offset = p - dynamic_shared();
    return dynamic_shared() + (offset ^ (offset >> 3 & 0x70));
}

static void move(const TileCopy &copy) {
    const TileMap &map = copy.map;
    for (int r = 0; r < map.box_rows; r++)
        for (int c = 0; c < map.box_columns; c++) {
            const int row = copy.row + r, column = copy.column + c;
            const bool inside = row >= 0 && row < map.rows && column >= 0 && column < map.columns;
            char *to = swizzled(copy.to + 2 * (r * map.box_columns + c));
            if (inside) memcpy(to, map.begin + row * map.pitch + 2 * column, 2);
            else memset(to, 0, 2);
        }
    copy.barrier->bytes -= copy.bytes();
}

static void finish_tile(size_t i) {
    const TileCopy copy = copies[i];
    copies.erase(copies.begin() + i);
    move(copy);
    end_phase_if_complete(*copy.barrier);
}

bool finish_one_copy() {
    const size_t count = copies.size() + arrivals.size();
    if (!count) return false;
    const size_t i = options.schedule == shuffled ? random_bits() % count : 0;
    if (i < copies.size()) finish_tile(i);
    else finish_oldest_arrival(arrivals[i - copies.size()].thread);
    return true;
}

void load_tile(void *to, const TileMap &map, void *p, int row, int column, Where where) {
    Barrier &barrier = barrier_at(p, where);
    if (!barrier.published) fail("unfenced", where, "the copy engine may not see the barrier yet: fence_mbarrier_init shows it");
    if (((char *)to - dynamic_shared()) % 1024) fail("misaligned", where, "a tile begins at a multiple of 1024 bytes of shared memory");
    const int first = std::max(column, 0), end = std::min(column + map.box_columns, map.columns);
    for (int r = std::max(row, 0); r < std::min(row + map.box_rows, map.rows) && first < end; r++)
        touch(map.begin + r * map.pitch + 2 * first, 2 * (end - first), Access::read, where);
    const TileCopy copy = {(char *)to, map, row, column, &barrier, barrier.phase, where};
    touch_as(barrier.agent, barrier.phase + 1, release(), to, copy.bytes(), Access::write, where);
    copies.push_back(copy);
    unheeded.push_back({&barrier, barrier.phase, "this tile", where});
    if (options.schedule == reverse || (options.schedule == shuffled && random_bits() % 2)) finish_tile(copies.size() - 1);
}

// ---- products

struct Accumulator {
    float *shares[128];  // where it is, by thread
    std::vector<float> values;  // what it is while products are under way: all shares, one after the other
    int group;  // of the newest product
    Where where;
};

struct Started {
    Product product;
    Accumulator *accumulator;
    int group;
    Where where;
};

struct Warpgroup {
    bool fenced;
    int groups;  // committed
    std::vector<Started> products;  // that have not run, oldest first
    std::map<float *, Accumulator> accumulators;  // by the first thread's share
};
static std::vector<Warpgroup> all_warpgroups;

static Warpgroup &warpgroup() { return all_warpgroups[current / 128]; }

// Return where element k of row i lies (of b: of column i), by its descriptor.
static const char *element(const Matrix &matrix, int i, int k, Where where) {
    const uint64_t d = matrix.descriptor;
    const size_t begin = (d & 0x3fff) << 4, leading = (d >> 16 & 0x3fff) << 4, stride = (d >> 32 & 0x3fff) << 4;
    if (d >> 62 != 1) fail("launch", where, "the emulator knows the 128-byte swizzle only: make descriptors with shared_matrix");
    const size_t offset = matrix.is_columns ? begin + i % 64 * 2 + i / 64 * leading + k % 8 * 128 + k / 8 * stride
                                            : begin + i % 8 * 128 + i / 8 * stride + k * 2;
    if (offset + 2 > MOST_SHARED) fail("out of bounds", where, "a matrix ends at byte %zu of shared memory", offset);
    return swizzled(dynamic_shared() + offset);
}

static void touch_matrix(const Matrix &matrix, int rows, uint32_t clock, const Knowledge &knowledge, Where where) {
    const int agent = agent_of_warpgroup(current / 128);
    // Swizzled or not, 8 neighbours along the rows of the tile lie together.
    for (int i = 0; i < rows; i += matrix.is_columns ? 8 : 1)
        for (int k = 0; k < 16; k += matrix.is_columns ? 1 : 8)
            touch_as(agent, clock, knowledge, element(matrix, i, k, where), 16, Access::read, where);
}

static float value(const char *p) {
    uint16_t bits;
    memcpy(&bits, p, 2);
    const uint32_t word = (uint32_t)bits << 16;
    float f;
    memcpy(&f, &word, 4);
    return f;
}

// Thread 32 w + 4 g + t holds in its element 4 j + 2 h + i row 16 w + 8 h + g and column 8 j + 2 t + i.
static void run(const Started &started) {
    const auto &[a, b, n, add] = started.product;
    static float rows[64][16], columns[16][256], sums[64][256];  // too large for a fiber's stack
    for (int k = 0; k < 16; k++) {
        for (int i = 0; i < 64; i++) rows[i][k] = value(element(a, i, k, started.where));
        for (int j = 0; j < n; j++) columns[k][j] = value(element(b, j, k, started.where));
    }
    const auto each = [&, n = n](auto visit) {
        float *share = started.accumulator->values.data();
        for (int t = 0; t < 128; t++)
            for (int e = 0; e < n / 2; e++)
                visit(*share++, sums[t / 32 * 16 + e / 2 % 2 * 8 + t % 32 / 4][e / 4 * 8 + t % 4 * 2 + e % 2]);
    };
    each([add = add](float share, float &sum) { sum = add ? share : 0.0f; });
    for (int i = 0; i < 64; i++)
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < n; j++) sums[i][j] += rows[i][k] * columns[k][j];
    each([](float &share, float sum) { share = sum; });
}

static void run_older_than(int group) {
    std::vector<Started> &products = warpgroup().products;
    while (!products.empty() && products[0].group < group) {
        run(products[0]);
        products.erase(products.begin());
    }
}

struct Share {
    Product product;
    float *d;
};

static void start(void **deposits, unsigned, Where where) {
    const Product &product = ((Share *)deposits[0])->product;
    const int n = product.n, first = current - current % 128;
    const auto differs = [](const Matrix &a, const Matrix &b) { return a.descriptor != b.descriptor; };
    for (int t = 1; t < 128; t++) {
        const Product &other = ((Share *)deposits[t])->product;
        if (differs(other.a, product.a) || differs(other.b, product.b) || other.add != product.add)
            fail("divergence", where, "threads %d and %d of a warpgroup start different products", first, first + t);
    }
    if (!warpgroup().fenced) fail("unfenced", where, "a group of products begins with wgmma_fence: the accumulators may not be set yet");
    const int clock = warpgroup().groups + 1;
    const Knowledge knowledge = known_to_all(first, 128);
    touch_matrix(product.a, 64, clock, knowledge, where);
    touch_matrix(product.b, n, clock, knowledge, where);
    Accumulator &accumulator = warpgroup().accumulators[((Share *)deposits[0])->d];
    for (int t = 0; t < 128 && accumulator.values.size() < 64u * n; t++) {
        float *d = accumulator.shares[t] = ((Share *)deposits[t])->d;
        accumulator.values.insert(accumulator.values.end(), d, d + n / 2);
        std::fill_n(d, n / 2, NAN);
    }
    accumulator.group = warpgroup().groups;
    accumulator.where = where;
    warpgroup().products.push_back({product, &accumulator, warpgroup().groups, where});
    if (options.schedule == reverse || (options.schedule == shuffled && random_bits() % 2)) run_older_than(clock);
}

void multiply(const Product &product, float *d, Where where) {
    Share share = {product, d};
    collective(Operation::warpgroup, ~0u, &share, start, where);
}

void fence_products(Where where) {
    collective(Operation::warpgroup, ~0u, nullptr, [](void **, unsigned, Where) { warpgroup().fenced = true; }, where);
}

void commit_products(Where where) {
    const auto commit = [](void **, unsigned, Where) {
        warpgroup().groups++;
        warpgroup().fenced = false;
    };
    collective(Operation::warpgroup, ~0u, nullptr, commit, where);
}

void wait_for_products(int groups_left, Where where) {
    const auto wait = [](void **deposits, unsigned, Where) {
        const int ended = warpgroup().groups - *(int *)deposits[0];
        run_older_than(ended);
        auto &accumulators = warpgroup().accumulators;
        for (auto i = accumulators.begin(); i != accumulators.end();) {
            Accumulator &accumulator = i->second;
            if (accumulator.group >= ended) {
                i++;
                continue;
            }
            const size_t size = accumulator.values.size() / 128;
            for (int t = 0; t < 128; t++) memcpy(accumulator.shares[t], &accumulator.values[t * size], size * sizeof(float));
            i = accumulators.erase(i);
        }
    };
    collective(Operation::warpgroup, ~0u, &groups_left, wait, where);
    Knowledge ended(agent_of_warpgroup(current / 128) + 1);
    ended.back() = std::max(0, warpgroup().groups - groups_left);
    learn(ended);
}

void check_no_products() {
    for (const auto &[share, accumulator] : warpgroup().accumulators)
        fail("in flight", accumulator.where, "the thread exits before its product was waited for");
}

// ---- blocks

void begin_block() {
    barriers.clear();
    copies.clear();
    arrivals.clear();
    unheeded.clear();
    all_warpgroups.assign(warpgroups(), {});
}

void end_block() {
    for (const Unheeded &copy : unheeded)
        if (copy.phase >= copy.barrier->waited) fail("in flight", copy.where, "the block ends before anybody has waited for %s", copy.what);
}

}  // namespace emulator
