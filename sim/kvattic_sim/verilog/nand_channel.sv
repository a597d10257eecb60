// Behavioural model of one channel's NAND dies and PHY, at the PHY interface (hdl/kvattic_hdl/flash/phy.py).
//
// What it does and checks is in docs/nand.md; kvattic_sim/nand/twin.py does the same in the same cycle, and
// kvattic_sim/nand/files.py gives the parameters and writes and reads the files.  All files are in the working directory:
//
//   nand<channel>.cfg    read when `configure` changes: times, faults, trace on or off; a line is a key and its values
//   nand<channel>.bin    read when `load` changes: records of 32 bits page number (die, plane, block, page without
//                        gaps), 32 bits number of words (both big-endian), the words, last byte of a word first
//   nand<channel>.dump   written when `dump` changes: a line for each page kept, its number and its words in hex
//   nand<channel>.log    what the controller did wrong, a line each
//   nand<channel>.trace  with `trace 1`: start end die plane kind page, in cycles
//
// Times are ticks, 2**-20 of a cycle.  Contents live in FRAMES page frames, taken at the first program or load of a page
// and given back by its erase; what an array operation does to contents is done when it is confirmed, since nothing can
// see it before the operation ends.  `rst` resets the PHY, not the dies.
//
// Everything is clocked, internal state is assigned blocking in one process: Verilator and Icarus 11 agree on it.

module nand_channel #(
    // Fields of the payloads; the target is in the lowest bits of both.
    parameter TARGET_BITS = 3,
    parameter CYCLE_BITS = 12,
    parameter CYCLE_ADDRESS_AT = 3,
    parameter CYCLE_BYTE_AT = 4,
    parameter BURST_BITS = 19,
    parameter BURST_WRITE_AT = 3,
    parameter BURST_BYTES_AT = 4,
    parameter BURST_BYTES_BITS = 15,
    parameter WORD_BITS = 64,
    // Geometry.
    parameter DIES = 8,
    parameter PLANES = 4,
    parameter BLOCKS = 256,       // of a plane
    parameter PAGES = 256,        // of a block
    parameter MARK_COLUMN = 16384, // of the factory's mark of a bad block
    parameter RAW_BYTES = 18592,
    parameter PAGE_WORDS = 2324,
    parameter FRAMES = 256,       // pages whose contents are kept
    parameter SEPARATE_BUS = 0,
    parameter RETRY_LEVELS = 3,
    parameter ENDURANCE = 30000,
    parameter FAULTS = 256,       // entries of the fault list
    parameter CUTS = 16           // power cuts
) (
    input clk,
    input rst,
    input [31:0] channel,          // its number

    input cycles_valid,
    output reg cycles_ready,
    input [CYCLE_BITS-1:0] cycles_payload,
    input bursts_valid,
    output reg bursts_ready,
    input [BURST_BITS-1:0] bursts_payload,
    output reg [WORD_BITS-1:0] read,
    output reg read_valid,
    input write_valid,
    output reg write_ready,
    input [WORD_BITS-1:0] write_payload,
    output reg [DIES-1:0] ready,

    input configure,
    input load,
    input dump,

    // For a test bench between the edges.
    output reg [31:0] cycle,       // the one that the next edge ends
    output reg powered,
    output reg [31:0] violations,
    output reg [31:0] load_errors, // files or records that cannot be used, pages that found no frame
    output reg [31:0] words_moved,
    output reg [31:0] page_reads,
    output reg [31:0] page_programs,
    output reg [31:0] block_erases,
    output reg [31:0] program_failures,
    output reg [31:0] erase_failures,
    output reg [31:0] bit_flips
);

  localparam F = 20;
  localparam [63:0] ONE = 64'd1 << F;
  localparam [63:0] NEVER = 64'd1 << 62;
  localparam W = WORD_BITS / 8;
  localparam CHUNKS = WORD_BITS / 32;
  localparam PAGE_BITS = $clog2(PAGES);
  localparam PLANE_BITS = $clog2(PLANES);
  localparam TOTAL_BLOCKS = DIES * PLANES * BLOCKS;
  localparam TOTAL_PAGES = TOTAL_BLOCKS * PAGES;
  localparam [WORD_BITS-1:0] ONES = {WORD_BITS{1'b1}};
  localparam [WORD_BITS-1:0] BIT = 1;

  // Violations (nand_twin.Violation).
  localparam NO_DIE = 1, NEEDS_RESET = 2, UNKNOWN = 3, BUSY = 4, T_WB = 5, MOVING = 6, SEQUENCE = 7, NO_ADDRESS = 8,
      NO_CONFIRM = 9, RANGE = 10, SAME_PLANE = 11, OTHER_PAGE = 12, NO_READ = 13, LAST_PAGE = 14, ARRAY_BUSY = 15,
      NOT_ERASED = 16, ORDER = 17, NOT_HELD = 18, DATA_BUSY = 19, T_RR = 20, T_CCS = 21, T_WHR = 22, T_ADL = 23,
      NOTHING = 24, NO_PROGRAM = 25, BEYOND = 26, EMPTY = 27, LEVEL = 28, FEATURE = 29;
  // Faults (nand_twin.Fault).
  localparam FACTORY_BAD = 1, GROWN_BAD = 2, PROGRAM_FAIL = 3, ERASE_FAIL = 4, STUCK_BUSY = 5, RETRY = 6,
      STUCK_COLUMN = 7, FACTORY_MARK = 8;
  // Operations of the array, kinds of a multi-plane queue, and the further kinds of the trace.
  localparam [3:0] IDLE = 0, READ = 1, PROGRAM = 2, ERASE = 3, RESET = 4, FEATURES = 5, COMMAND = 6, IN = 7, OUT = 8;
  // What a die gives out.
  localparam [2:0] OUT_NONE = 0, OUT_STATUS = 1, OUT_PLANE_STATUS = 2, OUT_ID = 3, OUT_PARAMETERS = 4, OUT_FEATURE = 5,
      OUT_REGISTER = 6;
  localparam [8:0] NONE = 9'h100;

  // ---------------------------------------------------------------- settings
  reg [63:0] t_r, t_prog, t_bers, t_dbsy, t_rcbsy, t_pcbsy, t_wb, t_rr, t_ccs, t_adl, t_whr, t_cad, t_pre, t_feat, t_rst,
      t_rst_idle, t_byte;
  reg [31:0] seed, random;
  real bit_error_rate, retry_error_rate;
  reg tracing;
  reg [7:0] parameters [0:255];
  integer fault_kind [0:FAULTS-1], fault_die [0:FAULTS-1], fault_plane [0:FAULTS-1], fault_block [0:FAULTS-1],
      fault_page [0:FAULTS-1], fault_value [0:FAULTS-1];
  integer fault_count;
  reg [31:0] power_at [0:2*CUTS-1];
  integer power_next, power_count;

  // ---------------------------------------------------------------- contents
  reg [WORD_BITS-1:0] frames [0:FRAMES*PAGE_WORDS-1];
  reg [31:0] frame_of [0:TOTAL_PAGES-1];   // of a page, from 1; 0: none
  reg [31:0] free_frames [0:FRAMES-1];     // a stack
  integer free_count;
  reg [31:0] next_page [0:TOTAL_BLOCKS-1]; // first page that is not programmed
  reg [31:0] erases [0:TOTAL_BLOCKS-1];
  reg garbage [0:TOTAL_BLOCKS-1];          // an erase was cut short
  reg [WORD_BITS-1:0] registers [0:DIES*PLANES*PAGE_WORDS-1];

  // ---------------------------------------------------------------- dies
  reg needs_reset [0:DIES-1];
  reg [31:0] features [0:4*DIES-1];
  reg [63:0] busy_from [0:DIES-1], busy_until [0:DIES-1];
  reg stuck [0:DIES-1];
  reg [31:0] operations [0:DIES-1];
  // The sequence under way.
  reg [8:0] command [0:DIES-1];
  reg [2:0] count [0:DIES-1];              // address cycles that came
  reg [39:0] address [0:DIES-1];
  reg [63:0] sequence_start [0:DIES-1];
  reg program_open [0:DIES-1], feature_open [0:DIES-1];
  reg [3:0] queue [0:DIES-1];
  reg [PLANES-1:0] queued [0:DIES-1];
  reg [23:0] queued_row [0:DIES*PLANES-1];
  reg [23:0] queued_page [0:DIES-1];
  reg [23:0] program_row [0:DIES-1];
  integer program_plane [0:DIES-1];
  reg [31:0] feature_bytes [0:DIES-1];
  // What comes out.
  reg [2:0] out [0:DIES-1], source [0:DIES-1];
  integer out_plane [0:DIES-1], status_plane [0:DIES-1];
  reg [31:0] column [0:DIES-1];
  reg [7:0] out_address [0:DIES-1];
  reg [PLANES-1:0] held [0:DIES-1];
  reg [23:0] held_row [0:DIES*PLANES-1];
  reg [63:0] data_from [0:DIES-1];
  integer data_rule [0:DIES-1];
  // The last read.
  reg [PLANES-1:0] read_mask [0:DIES-1];
  reg [23:0] read_row [0:DIES*PLANES-1];
  integer last_plane [0:DIES-1];
  reg pending [0:DIES-1];
  // The array's operation, and the program before it.
  reg [3:0] array_kind [0:DIES-1], before_kind [0:DIES-1];
  reg [63:0] array_start [0:DIES-1], before_start [0:DIES-1], array_end [0:DIES-1], before_end [0:DIES-1];
  reg [PLANES-1:0] array_mask [0:DIES-1], before_mask [0:DIES-1], array_failed [0:DIES-1], before_failed [0:DIES-1];
  reg [23:0] array_row [0:DIES*PLANES-1], before_row [0:DIES*PLANES-1];
  reg array_cached [0:DIES-1], before_cached [0:DIES-1];

  // ---------------------------------------------------------------- bus
  reg [63:0] cycle_free, data_free;        // when the next cycle or burst may begin
  reg [63:0] word_time, data_end, burst_start, first_word;
  integer data_target;                     // of the last burst
  integer left, bytes_left;                // words and bytes of the burst that are to come
  reg writing, spoiled;
  reg [63:0] ready_at;                     // when R/B_n changes next
  reg [DIES-1:0] ready_now;

  // ---------------------------------------------------------------- variables of the process
  reg [63:0] now, after, c_start, c_end, c_at, b_start, b_at, ticks, begin_at, finish_at, sequence_at;
  reg c_address, complete, bare, ordinary, grown;
  reg [7:0] c_byte;
  integer d, i, p, w, n, bad, length, taken, base, frame, index, block_index, where, position, fault, limit;
  integer kind, r_plane, r_block, r_page, plane, following, page;
  reg [23:0] row;
  reg [31:0] row_column, x;
  reg r_ok;
  reg [PLANES-1:0] new_mask, failed;
  reg [23:0] new_row [0:PLANES-1];
  reg [WORD_BITS-1:0] word, mask;
  reg [2*WORD_BITS-1:0] pair, pair_mask;
  real rate, u;
  reg [63:0] y;
  integer file, got, log_file, trace_file, key_value;
  reg [63:0] header;
  reg [8*32-1:0] name;
  reg [8*20-1:0] key;
  reg configured, loaded, dumped;
  integer v [0:5];

  function [31:0] hash(input [31:0] value);
    begin
      hash = value ^ (value >> 16);
      hash = hash * 32'h7FEB352D;
      hash = hash ^ (hash >> 15);
      hash = hash * 32'h846CA68B;
      hash = hash ^ (hash >> 16);
    end
  endfunction

  function integer addresses(input [8:0] first);  // that a command wants; 0: it is no first command
    case (first)
      9'h00, 9'h06, 9'h80, 9'h81: addresses = 5;
      9'h60, 9'h78: addresses = 3;
      9'h05, 9'h85: addresses = 2;
      9'h90, 9'hEC, 9'hEE, 9'hEF: addresses = 1;
      default: addresses = 0;
    endcase
  endfunction

  function confirms(input [7:0] byte_);
    case (byte_)
      8'h10, 8'h11, 8'h15, 8'h30, 8'h31, 8'h32, 8'h3F, 8'hD0, 8'hD1, 8'hE0: confirms = 1;
      default: confirms = 0;
    endcase
  endfunction

  function during_read(input [7:0] byte_);
    case (byte_)
      8'h00, 8'h05, 8'h06, 8'h31, 8'h32, 8'h3F, 8'h70, 8'h78, 8'hE0: during_read = 1;
      default: during_read = 0;
    endcase
  endfunction

  function during_program(input [7:0] byte_);
    case (byte_)
      8'h10, 8'h11, 8'h15, 8'h70, 8'h78, 8'h80, 8'h81, 8'h85: during_program = 1;
      default: during_program = 0;
    endcase
  endfunction

  function integer feature_index(input [7:0] byte_);  // 4: the die does not have it
    case (byte_)
      8'h01: feature_index = 0;
      8'h02: feature_index = 1;
      8'h10: feature_index = 2;
      8'h89: feature_index = 3;
      default: feature_index = 4;
    endcase
  endfunction

  function [8*64-1:0] text(input integer violation);
    case (violation)
      NO_DIE: text = "there is no such die";
      NEEDS_RESET: text = "needs a reset (FFh) after power-up";
      UNKNOWN: text = "unknown command";
      BUSY: text = "cycle while busy";
      T_WB: text = "cycle before tWB is over";
      MOVING: text = "cycle while its data move";
      SEQUENCE: text = "command in the middle of another";
      NO_ADDRESS: text = "address that no command asked for";
      NO_CONFIRM: text = "confirmation without its command and addresses";
      RANGE: text = "address out of range";
      SAME_PLANE: text = "planes of a multi-plane operation must differ";
      OTHER_PAGE: text = "planes of a multi-plane operation must have the same page";
      NO_READ: text = "cache read without a read before it";
      LAST_PAGE: text = "sequential cache read beyond the block";
      ARRAY_BUSY: text = "array is busy with another operation";
      NOT_ERASED: text = "program of a page that is not erased";
      ORDER: text = "program out of order in its block";
      NOT_HELD: text = "selected page is not in the plane's register";
      DATA_BUSY: text = "data while busy";
      T_RR: text = "data before tRR is over";
      T_CCS: text = "data before tCCS is over";
      T_WHR: text = "data before tWHR is over";
      T_ADL: text = "data before tADL is over";
      NOTHING: text = "data out, but nothing to read";
      NO_PROGRAM: text = "data in, but nothing to write to";
      BEYOND: text = "burst beyond the data";
      EMPTY: text = "burst of no bytes";
      LEVEL: text = "read-retry level that the part does not have";
      default: text = "feature that the die does not have";
    endcase
  endfunction

  // ---------------------------------------------------------------- reports
  task report(input integer violation, input integer die, input integer detail, input burst);
    begin
      violations = violations + 1;
      if (log_file == 0) begin
        $sformat(name, "nand%0d.log", channel);
        log_file = $fopen(name, "w");
      end
      if (burst) begin
        $display("channel %0d die %0d cycle %0d: %0s (%0d bytes)", channel, die, cycle, text(violation), detail);
        $fdisplay(log_file, "channel %0d die %0d cycle %0d: %0s (%0d bytes)", channel, die, cycle, text(violation),
            detail);
      end else begin
        $display("channel %0d die %0d cycle %0d: %0s (byte %hh)", channel, die, cycle, text(violation),
            detail[7:0]);
        $fdisplay(log_file, "channel %0d die %0d cycle %0d: %0s (byte %hh)", channel, die, cycle, text(violation),
            detail[7:0]);
      end
      $fflush(log_file);
    end
  endtask

  task record(input [63:0] from, input [63:0] to, input integer die, input integer of_plane, input [3:0] what,
      input integer of_page);
    if (tracing) begin
      $fwrite(trace_file, "%0d %0d %0d %0d ", from >> F, to >> F, die, of_plane);
      case (what)
        READ: $fwrite(trace_file, "read");
        PROGRAM: $fwrite(trace_file, "program");
        ERASE: $fwrite(trace_file, "erase");
        RESET: $fwrite(trace_file, "reset");
        FEATURES: $fwrite(trace_file, "feature");
        COMMAND: $fwrite(trace_file, "command");
        IN: $fwrite(trace_file, "in");
        default: $fwrite(trace_file, "out");
      endcase
      $fdisplay(trace_file, " %0d", of_page);
    end
  endtask

  // ---------------------------------------------------------------- places
  task split(input [23:0] of_row);  // sets r_plane, r_block, r_page, r_ok, where (block), index (page) on die d
    begin
      r_page = of_row & ((1 << PAGE_BITS) - 1);
      r_plane = (of_row >> PAGE_BITS) & (PLANES - 1);
      r_block = of_row >> (PAGE_BITS + PLANE_BITS);
      r_ok = r_block < BLOCKS && r_page < PAGES;
      where = (d * PLANES + r_plane) * BLOCKS + r_block;
      index = where * PAGES + r_page;
    end
  endtask

  // The first entry from `fault` on of this kind that meets the place of `split`; `fault` is fault_count if none does.
  task find(input integer of_kind);
    while (fault < fault_count && !(fault_kind[fault] == of_kind && fault_die[fault] == d
        && fault_plane[fault] == r_plane && (fault_block[fault] == -1 || fault_block[fault] == r_block)
        && (fault_page[fault] == -1 || fault_page[fault] == r_page))) fault = fault + 1;
  endtask

  // ---------------------------------------------------------------- dies
  task abandon(input integer die);
    begin
      command[die] = NONE;
      count[die] = 0;
      program_open[die] = 0;
      feature_open[die] = 0;
      queue[die] = IDLE;
      queued[die] = 0;
    end
  endtask

  task forget(input integer die);  // all that a reset clears
    begin
      abandon(die);
      out[die] = OUT_NONE;
      source[die] = OUT_NONE;
      out_plane[die] = 0;
      status_plane[die] = 0;
      column[die] = 0;
      out_address[die] = 0;
      program_row[die] = 0;
      program_plane[die] = 0;
      held[die] = 0;
      read_mask[die] = 0;
      last_plane[die] = 0;
      pending[die] = 0;
      data_from[die] = 0;
      data_rule[die] = T_WHR;
      array_kind[die] = IDLE;
      array_start[die] = 0;
      array_end[die] = 0;
      array_mask[die] = 0;
      array_failed[die] = 0;
      array_cached[die] = 0;
      no_before(die);
    end
  endtask

  task no_before(input integer die);
    begin
      before_kind[die] = IDLE;
      before_start[die] = 0;
      before_end[die] = 0;
      before_mask[die] = 0;
      before_failed[die] = 0;
      before_cached[die] = 0;
    end
  endtask

  task power_up(input integer die);
    begin
      needs_reset[die] = 1;
      for (i = 0; i < 4; i = i + 1) features[4 * die + i] = 0;
      busy_from[die] = 0;
      busy_until[die] = 0;
      stuck[die] = 0;
      forget(die);
    end
  endtask

  task set_busy(input [63:0] to);  // die d, from tWB after c_end on
    begin
      busy_from[d] = c_end + t_wb;
      busy_until[d] = stuck[d] ? NEVER : to;
      ready_at = 0;
    end
  endtask

  // ---------------------------------------------------------------- contents
  task noise_word(input integer of_page, input integer of_word);  // into `word`
    for (n = 0; n < CHUNKS; n = n + 1)
      word[32 * n +: 32] = hash((of_word * CHUNKS + n) * 32'h85EBCA77 + of_page * 32'h9E3779B1 + seed);
  endtask

  task allocate;  // a frame for page `index`, its first word in `base`; base < 0: none is left
    if (frame_of[index] != 0) base = (frame_of[index] - 1) * PAGE_WORDS;
    else if (free_count == 0) begin
      base = -1;
      load_errors = load_errors + 1;
      $display("channel %0d cycle %0d: no frame is left for page %0d", channel, cycle, index);
    end else begin
      free_count = free_count - 1;
      frame_of[index] = free_frames[free_count] + 1;
      base = (frame_of[index] - 1) * PAGE_WORDS;
    end
  endtask

  task release_page(input integer of_page);
    if (frame_of[of_page] != 0) begin
      free_frames[free_count] = frame_of[of_page] - 1;
      free_count = free_count + 1;
      frame_of[of_page] = 0;
    end
  endtask

  task skip;  // good bits before the next bad one, onto `position`
    begin
      random = random ^ (random << 13);
      random = random ^ (random >> 17);
      random = random ^ (random << 5);
      y = random;
      y = y + 1;
      u = y;
      u = $ln(u / 4294967296.0) * (1.0 / $ln(1.0 - rate));
      if (u > 1.0e9) u = 1.0e9;
      position = position + $rtoi(u);
    end
  endtask

  task sense;  // page `row` of die d into its plane's register
    begin
      split(row);
      base = (d * PLANES + r_plane) * PAGE_WORDS;
      if (frame_of[index] != 0) begin
        frame = (frame_of[index] - 1) * PAGE_WORDS;
        for (w = 0; w < PAGE_WORDS; w = w + 1) registers[base + w] = frames[frame + w];
      end else if (garbage[where]) begin
        for (w = 0; w < PAGE_WORDS; w = w + 1) begin
          noise_word(index, w);
          registers[base + w] = word;
        end
      end else for (w = 0; w < PAGE_WORDS; w = w + 1) registers[base + w] = ONES;
      fault = 0;
      find(FACTORY_MARK);
      if (fault < fault_count)
        registers[base + MARK_COLUMN / W] = registers[base + MARK_COLUMN / W]
            & ~((BIT * 255) << (8 * (MARK_COLUMN % W)));
      rate = bit_error_rate;
      fault = 0;
      find(RETRY);
      if (fault < fault_count) if (fault_value[fault] != features[4 * d + 3][7:0]) rate = retry_error_rate;
      if (rate > 0.0) begin
        position = 0;
        skip;
        while (position < 8 * RAW_BYTES) begin
          registers[base + position / WORD_BITS] = registers[base + position / WORD_BITS]
              ^ (BIT << (position % WORD_BITS));
          bit_flips = bit_flips + 1;
          position = position + 1;
          skip;
        end
      end
      for (fault = 0; fault < fault_count; fault = fault + 1)
        if (fault_kind[fault] == STUCK_COLUMN && fault_die[fault] == d && fault_plane[fault] == r_plane
            && fault_block[fault] < RAW_BYTES) begin
          word = fault_page[fault];
          word = word << (8 * (fault_block[fault] % W));
          mask = fault_value[fault];
          mask = mask << (8 * (fault_block[fault] % W));
          registers[base + fault_block[fault] / W] = (registers[base + fault_block[fault] / W] & ~word)
              | (mask & word);
        end
    end
  endtask

  task fill_registers;  // the pages of the last read go into the registers
    begin
      for (p = 0; p < PLANES; p = p + 1) if (read_mask[d][p]) begin
        page_reads = page_reads + 1;
        row = read_row[d * PLANES + p];
        sense;
        held[d] = held[d] | (1 << p);
        held_row[d * PLANES + p] = row;
      end
      out_plane[d] = last_plane[d];
    end
  endtask

  // A program or erase of die d that ends before its time: of page `row`.
  task spoil(input [3:0] of_kind, input of_begun);
    begin
      split(row);
      if (of_kind == PROGRAM && !of_begun) begin
        release_page(index);
        next_page[where] = r_page;
      end else if (of_kind == PROGRAM) begin
        if (frame_of[index] != 0) begin
          base = (frame_of[index] - 1) * PAGE_WORDS;
          for (w = 0; w < PAGE_WORDS; w = w + 1) begin
            noise_word(index, w);
            frames[base + w] = frames[base + w] | word;
          end
        end
      end else if (of_kind == ERASE) begin
        garbage[where] = 1;
        for (w = 0; w < PAGES; w = w + 1) release_page(where * PAGES + w);
        next_page[where] = PAGES;
      end
    end
  endtask

  task interrupt(input [63:0] at);  // die d
    begin
      if (before_end[d] > at)
        for (p = 0; p < PLANES; p = p + 1) if (before_mask[d][p]) begin
          row = before_row[d * PLANES + p];
          spoil(before_kind[d], before_start[d] <= at);
        end
      if (array_end[d] > at)
        for (p = 0; p < PLANES; p = p + 1) if (array_mask[d][p]) begin
          row = array_row[d * PLANES + p];
          spoil(array_kind[d], array_start[d] <= at);
        end
    end
  endtask

  // ---------------------------------------------------------------- array operations
  task count_operation;
    begin
      operations[d] = operations[d] + 1;
      for (fault = 0; fault < fault_count; fault = fault + 1)
        if (fault_kind[fault] == STUCK_BUSY && fault_die[fault] == d && operations[d] >= fault_value[fault])
          stuck[d] = 1;
    end
  endtask

  task run(input [3:0] of_kind, input [63:0] from, input [63:0] to, input cached, input [63:0] busy_to);
    begin
      array_kind[d] = of_kind;
      array_start[d] = from;
      array_end[d] = to;
      array_mask[d] = new_mask;
      array_failed[d] = failed;
      array_cached[d] = cached;
      for (p = 0; p < PLANES; p = p + 1) array_row[d * PLANES + p] = new_row[p];
      set_busy(busy_to);
      if (stuck[d]) array_end[d] = NEVER;
      for (p = 0; p < PLANES; p = p + 1) if (new_mask[p]) begin
        split(new_row[p]);
        record(from, array_end[d], d, p, of_kind, index);
      end
    end
  endtask

  task begin_when_free;  // begin_at: when the array can start what is confirmed now
    begin
      begin_at = c_end + t_wb;
      if (array_end[d] > begin_at) begin_at = array_end[d];
    end
  endtask

  task keep_read;  // new_mask, new_row are the last read, `plane` was addressed last
    begin
      read_mask[d] = new_mask;
      for (p = 0; p < PLANES; p = p + 1) read_row[d * PLANES + p] = new_row[p];
      last_plane[d] = plane;
    end
  endtask

  task start_cache_read;
    begin
      count_operation;
      begin_when_free;
      if (pending[d]) fill_registers;
      begin_at = begin_at + t_rcbsy;
      no_before(d);
      failed = 0;
      keep_read;
      pending[d] = 1;
      out[d] = OUT_REGISTER;
      source[d] = OUT_REGISTER;
      column[d] = 0;
      data_from[d] = 0;
      run(READ, begin_at, begin_at + t_r, 0, begin_at);
    end
  endtask

  task cache_read;  // 31h alone and 3Fh
    if (read_mask[d] == 0 || (c_byte == 8'h3F && !pending[d])) bad = NO_READ;
    else begin
      page = -1;
      if (c_byte == 8'h31) begin
        split(read_row[d * PLANES + last_plane[d]]);
        if (r_page + 1 >= PAGES) bad = LAST_PAGE;
        page = index + 1;
      end
      if (bad == 0) begin
        command[d] = NONE;
        count[d] = 0;
        record(sequence_at, c_end, d, -1, COMMAND, page);
        if (c_byte == 8'h31) begin
          new_mask = read_mask[d];
          for (p = 0; p < PLANES; p = p + 1) new_row[p] = read_row[d * PLANES + p] + 1;
          plane = last_plane[d];
          start_cache_read;
        end else begin
          begin_when_free;
          if (pending[d]) fill_registers;
          pending[d] = 0;
          out[d] = OUT_REGISTER;
          source[d] = OUT_REGISTER;
          column[d] = 0;
          data_from[d] = 0;
          set_busy(begin_at + t_rcbsy);
        end
      end
    end
  endtask

  task do_program(input cached);
    begin
      count_operation;
      begin_when_free;
      failed = 0;
      for (p = 0; p < PLANES; p = p + 1) if (new_mask[p]) begin
        page_programs = page_programs + 1;
        split(new_row[p]);
        following = next_page[where];
        if (r_page < following) report(NOT_ERASED, d, cached ? 'h15 : 'h10, 0);
        else if (r_page > following) report(ORDER, d, cached ? 'h15 : 'h10, 0);
        if (r_page + 1 > following) next_page[where] = r_page + 1;
        fault = 0;
        find(FACTORY_BAD);
        if (fault < fault_count) failed = failed | (1 << p);
        else begin
          grown = 0;
          fault = 0;
          find(GROWN_BAD);
          while (fault < fault_count) begin
            if (erases[where] >= fault_value[fault]) grown = 1;
            fault = fault + 1;
            find(GROWN_BAD);
          end
          fault = 0;
          find(PROGRAM_FAIL);
          if (fault < fault_count) grown = 1;
          if (grown) failed = failed | (1 << p);
          frame = frame_of[index];  // 0: what was there is all ones, or garbage
          allocate;
          if (base >= 0)
            for (w = 0; w < PAGE_WORDS; w = w + 1) begin
              mask = ONES;
              if (frame == 0 && garbage[where]) begin
                noise_word(index, w);
                mask = word;
              end else if (frame != 0) mask = frames[base + w];
              mask = mask & registers[(d * PLANES + p) * PAGE_WORDS + w];
              if (grown) begin
                noise_word(index, w);
                mask = mask | word;
              end
              frames[base + w] = mask;
            end
        end
      end
      for (p = 0; p < PLANES; p = p + 1) if (failed[p]) program_failures = program_failures + 1;
      if (array_kind[d] == PROGRAM) begin
        before_kind[d] = PROGRAM;
        before_start[d] = array_start[d];
        before_end[d] = array_end[d];
        before_mask[d] = array_mask[d];
        before_failed[d] = array_failed[d];
        before_cached[d] = array_cached[d];
        for (p = 0; p < PLANES; p = p + 1) before_row[d * PLANES + p] = array_row[d * PLANES + p];
      end else no_before(d);
      if (cached) begin_at = begin_at + t_pcbsy;
      read_mask[d] = 0;
      pending[d] = 0;
      run(PROGRAM, begin_at, begin_at + t_prog, cached, cached ? begin_at : begin_at + t_prog);
    end
  endtask

  task do_erase;
    begin
      count_operation;
      begin_at = c_end + t_wb;
      failed = 0;
      for (p = 0; p < PLANES; p = p + 1) if (new_mask[p]) begin
        block_erases = block_erases + 1;
        split(new_row[p]);
        erases[where] = erases[where] + 1;
        grown = erases[where] > ENDURANCE;
        fault = 0;
        find(FACTORY_BAD);
        if (fault < fault_count) grown = 1;
        fault = 0;
        find(ERASE_FAIL);
        if (fault < fault_count) grown = 1;
        fault = 0;
        find(GROWN_BAD);
        while (fault < fault_count) begin
          if (erases[where] > fault_value[fault]) grown = 1;
          fault = fault + 1;
          find(GROWN_BAD);
        end
        if (grown) begin
          failed = failed | (1 << p);
          erase_failures = erase_failures + 1;
        end else begin
          garbage[where] = 0;
          next_page[where] = 0;
          for (w = 0; w < PAGES; w = w + 1) release_page(where * PAGES + w);
        end
      end
      no_before(d);
      read_mask[d] = 0;
      pending[d] = 0;
      run(ERASE, begin_at, begin_at + t_bers, 0, begin_at + t_bers);
    end
  endtask

  // ---------------------------------------------------------------- command and address cycles of die d
  task rule;
    begin
      if (needs_reset[d]) bad = NEEDS_RESET;
      else if (d == data_target && c_at < data_end) bad = MOVING;
      else if (c_at < busy_until[d] && c_at < busy_from[d]) bad = T_WB;
      else if (c_at < busy_until[d]
          && !(c_address ? command[d] == 9'h78 : c_byte == 8'h70 || c_byte == 8'h78)) bad = BUSY;
      else if (!c_address) begin
        if (addresses(c_byte) == 0 && !confirms(c_byte) && c_byte != 8'h70) bad = UNKNOWN;
        else if (c_at < array_end[d] && c_at >= busy_until[d]
            && !(array_kind[d] == READ && during_read(c_byte))
            && !(array_kind[d] == PROGRAM && during_program(c_byte))) bad = ARRAY_BUSY;
      end
    end
  endtask

  task do_reset;
    begin
      if (d == data_target && c_at < data_end) begin
        report(MOVING, d, 'hFF, 0);
        spoiled = 1;
      end
      finish_at = c_end + t_wb + (c_at < busy_until[d] || c_at < array_end[d] ? t_rst : t_rst_idle);
      begin_at = c_at < busy_until[d] && busy_from[d] < c_end + t_wb ? busy_from[d] : c_end + t_wb;
      interrupt(c_at);
      forget(d);
      needs_reset[d] = 0;
      set_busy(finish_at);
      busy_from[d] = begin_at;
      record(busy_from[d], busy_until[d], d, -1, RESET, -1);
    end
  endtask

  task do_first;
    begin
      if (c_byte == 8'h85) begin
        if (command[d] != NONE || !program_open[d]) bad = NO_CONFIRM;
      end else if ((command[d] != NONE && command[d] != 0) || count[d] != 0 || program_open[d] || feature_open[d])
        bad = SEQUENCE;
      if (bad == 0 && c_byte == 8'h81 && queue[d] != PROGRAM) bad = NO_CONFIRM;
      if (bad == 0 && queue[d] != IDLE && c_byte != 8'h70 && c_byte != 8'h78
          && !(queue[d] == READ && c_byte == 8'h00) && !(queue[d] == ERASE && c_byte == 8'h60)
          && !(queue[d] == PROGRAM && (c_byte == 8'h80 || c_byte == 8'h81 || c_byte == 8'h85))) bad = SEQUENCE;
      if (bad == 0) begin
        sequence_start[d] = c_start;
        if (c_byte == 8'h70 || c_byte == 8'h00) begin
          out[d] = c_byte == 8'h70 ? OUT_STATUS : source[d];
          data_from[d] = c_end + t_whr;
          data_rule[d] = T_WHR;
        end
        command[d] = c_byte == 8'h70 ? NONE : {1'b0, c_byte};
        if (c_byte != 8'h70) begin
          count[d] = 0;
          address[d] = 0;
        end else record(c_start, c_end, d, -1, COMMAND, -1);
      end
    end
  endtask

  task do_address;
    if (command[d] == NONE || count[d] >= addresses(command[d])) bad = NO_ADDRESS;
    else begin
      address[d] = address[d] | ({32'd0, c_byte} << (8 * count[d]));
      count[d] = count[d] + 1;
      if (count[d] == addresses(command[d]) && command[d] != 9'h00 && command[d] != 9'h05 && command[d] != 9'h06
          && command[d] != 9'h60) begin  // those wait for their confirmation
        row_column = address[d][15:0];
        case (command[d])
          9'h78: begin
            split(address[d][23:0]);
            out[d] = OUT_PLANE_STATUS;
            status_plane[d] = r_plane;
            data_from[d] = c_end + t_whr;
            data_rule[d] = T_WHR;
          end
          9'h80, 9'h81: begin
            split(address[d][39:16]);
            if (!r_ok || row_column >= RAW_BYTES) bad = RANGE;
            else begin
              program_open[d] = 1;
              program_row[d] = address[d][39:16];
              program_plane[d] = r_plane;
              column[d] = row_column;
              base = (d * PLANES + r_plane) * PAGE_WORDS;
              for (w = 0; w < PAGE_WORDS; w = w + 1) registers[base + w] = ONES;
              held[d] = held[d] & ~(1 << r_plane);
              data_from[d] = c_end + t_adl;
              data_rule[d] = T_ADL;
            end
          end
          9'h85: begin
            if (row_column >= RAW_BYTES) bad = RANGE;
            else begin
              column[d] = row_column;
              data_from[d] = c_end + t_ccs;
              data_rule[d] = T_CCS;
            end
          end
          9'h90: begin
            out[d] = OUT_ID;
            source[d] = OUT_ID;
            out_address[d] = c_byte;
            column[d] = 0;
            data_from[d] = c_end + t_whr;
            data_rule[d] = T_WHR;
          end
          9'hEC: begin
            if (c_byte != 0) bad = RANGE;
            else begin
              out[d] = OUT_PARAMETERS;
              source[d] = OUT_PARAMETERS;
              column[d] = 0;
              data_from[d] = 0;
              set_busy(c_end + t_wb + t_r);
            end
          end
          default: begin  // EEh, EFh
            if (feature_index(c_byte) == 4) bad = FEATURE;
            else begin
              out_address[d] = c_byte;
              if (command[d] == 9'hEE) begin
                out[d] = OUT_FEATURE;
                source[d] = OUT_FEATURE;
                column[d] = 0;
                data_from[d] = 0;
                set_busy(c_end + t_wb + t_feat);
                record(busy_from[d], busy_until[d], d, -1, FEATURES, -1);
              end else begin
                out[d] = OUT_NONE;
                source[d] = OUT_NONE;
                feature_open[d] = 1;
                data_from[d] = c_end + t_adl;
                data_rule[d] = T_ADL;
              end
            end
          end
        endcase
        if (bad == 0) begin
          command[d] = NONE;
          count[d] = 0;
          record(sequence_start[d], c_end, d, -1, COMMAND, -1);
        end
      end
    end
  endtask

  task change_column;
    if ((command[d] != 9'h05 && command[d] != 9'h06) || !complete) bad = NO_CONFIRM;
    else begin
      row_column = address[d][15:0];
      page = -1;
      if (command[d] == 9'h06 || source[d] != OUT_PARAMETERS) begin
        plane = out_plane[d];
        if (command[d] == 9'h06) begin
          row = address[d][39:16];
          split(row);
          plane = r_plane;
          if (!r_ok) bad = RANGE;
          else if (!held[d][plane] || held_row[d * PLANES + plane] != row) bad = NOT_HELD;
        end else if (!held[d][plane]) bad = NOTHING;
        if (bad == 0 && row_column >= RAW_BYTES) bad = RANGE;
        if (bad == 0) begin
          split(held_row[d * PLANES + plane]);
          page = index;
          source[d] = OUT_REGISTER;
          out_plane[d] = plane;
        end
      end else if (row_column >= 768) bad = RANGE;
      if (bad == 0) begin
        out[d] = source[d];
        column[d] = row_column;
        data_from[d] = c_end + t_ccs;
        data_rule[d] = T_CCS;
        command[d] = NONE;
        count[d] = 0;
        record(sequence_start[d], c_end, d, -1, COMMAND, page);
      end
    end
  endtask

  task do_confirm;
    begin
      complete = command[d] != NONE && count[d] == addresses(command[d]);
      bare = (command[d] == NONE || (command[d] == 0 && count[d] == 0)) && !program_open[d] && !feature_open[d];
      sequence_at = bare ? c_end - t_cad : sequence_start[d];
      ordinary = 1;
      kind = READ;
      case (c_byte)
        8'h10, 8'h11, 8'h15: begin
          kind = PROGRAM;
          row = program_row[d];
          sequence_at = c_end - t_cad;
          if (command[d] != NONE || !program_open[d]) bad = NO_CONFIRM;
        end
        8'hD0, 8'hD1: begin
          kind = ERASE;
          row = address[d][23:0];
          if (command[d] != 9'h60 || !complete) bad = NO_CONFIRM;
        end
        8'hE0: begin
          ordinary = 0;
          change_column;
        end
        default:
          if (c_byte == 8'h3F || (c_byte == 8'h31 && bare)) begin
            ordinary = 0;
            if (!bare || queue[d] != IDLE) bad = NO_CONFIRM;
            else cache_read;
          end else begin
            row = address[d][39:16];
            if (command[d] != 0 || !complete) bad = NO_CONFIRM;
            else if (address[d][15:0] >= RAW_BYTES) bad = RANGE;
          end
      endcase
      if (ordinary && bad == 0) begin
        split(row);
        plane = r_plane;
        if (!r_ok) bad = RANGE;
        else if (queue[d] != IDLE) begin
          if (queue[d] != kind) bad = SEQUENCE;
          else if (queued[d][plane]) bad = SAME_PLANE;
          else if (kind != ERASE && queued_page[d] != r_page) bad = OTHER_PAGE;
        end
        if (bad == 0 && c_byte == 8'h31 && read_mask[d] == 0) bad = NO_READ;
      end
      if (ordinary && bad == 0) begin
        if (queued[d] == 0) queued_page[d] = r_page;
        queued[d] = queued[d] | (1 << plane);
        queued_row[d * PLANES + plane] = row;
        row_column = address[d][15:0];
        record(sequence_at, c_end, d, -1, COMMAND, index);
        command[d] = NONE;
        count[d] = 0;
        program_open[d] = 0;
        if (c_byte == 8'h11 || c_byte == 8'h32 || c_byte == 8'hD1) begin
          queue[d] = kind;
          set_busy(c_end + t_wb + t_dbsy);
        end else begin
          new_mask = queued[d];
          for (p = 0; p < PLANES; p = p + 1) new_row[p] = queued_row[d * PLANES + p];
          queue[d] = IDLE;
          queued[d] = 0;
          if (c_byte == 8'h31) start_cache_read;
          else if (kind == PROGRAM) do_program(c_byte == 8'h15);
          else if (kind == ERASE) do_erase;
          else begin
            count_operation;
            no_before(d);
            failed = 0;
            keep_read;
            pending[d] = 0;
            fill_registers;
            out[d] = OUT_REGISTER;
            source[d] = OUT_REGISTER;
            column[d] = row_column;
            data_from[d] = 0;
            run(READ, c_end + t_wb, c_end + t_wb + t_r, 0, c_end + t_wb + t_r);
          end
        end
      end
    end
  endtask

  task do_cycle;
    if (powered) begin
      bad = 0;
      if (d >= DIES) report(NO_DIE, d, c_byte, 0);
      else if (!c_address && c_byte == 8'hFF) do_reset;
      else begin
        rule;
        if (bad == 0) begin
          if (c_address) do_address;
          else if (confirms(c_byte)) do_confirm;
          else do_first;
        end
        if (bad != 0) begin
          report(bad, d, c_byte, 0);
          abandon(d);
        end
      end
    end
  endtask

  // ---------------------------------------------------------------- bursts
  task check_out;
    begin
      if (needs_reset[d]) bad = NEEDS_RESET;
      else if ((command[d] != NONE && command[d] != 0) || count[d] != 0 || program_open[d] || feature_open[d]) begin
        bad = SEQUENCE;
        abandon(d);
      end else if (out[d] == OUT_NONE) bad = NOTHING;
      else if (out[d] == OUT_STATUS || out[d] == OUT_PLANE_STATUS) begin
        if (b_at < busy_from[d] && b_at < busy_until[d]) bad = T_WB;
        else if (b_at < data_from[d]) bad = data_rule[d];
      end else begin
        limit = out[d] == OUT_REGISTER ? RAW_BYTES : out[d] == OUT_ID ? 8 : out[d] == OUT_FEATURE ? 4 : 768;
        if (b_at < busy_until[d]) bad = b_at >= busy_from[d] ? DATA_BUSY : T_WB;
        else if (out[d] != OUT_ID && busy_until[d] != 0 && b_at < busy_until[d] + t_rr) bad = T_RR;
        else if (b_at < data_from[d]) bad = data_rule[d];
        else if (out[d] == OUT_REGISTER && !held[d][out_plane[d]]) bad = NOTHING;
        else if (column[d] + length > limit) bad = BEYOND;
      end
    end
  endtask

  task check_in;
    begin
      if (needs_reset[d]) bad = NEEDS_RESET;
      else begin
        if (command[d] != NONE || !(program_open[d] || feature_open[d])) bad = NO_PROGRAM;
        else if (b_at < busy_until[d]) bad = b_at >= busy_from[d] ? DATA_BUSY : T_WB;
        else if (b_at < data_from[d]) bad = data_rule[d];
        else if (program_open[d] && column[d] + length > RAW_BYTES) bad = BEYOND;
        else if (feature_open[d] && length != 4) bad = BEYOND;
        if (bad != 0) abandon(d);
      end
    end
  endtask

  task word_ticks;  // into `ticks`: time of the next word that is read, at least a cycle
    begin
      ticks = t_byte * (bytes_left < W ? bytes_left : W);
      if (ticks < ONE) ticks = ONE;
    end
  endtask

  task burst_page;  // into `page`: what a burst of die d moves
    begin
      page = -1;
      if (!spoiled) begin
        if (writing && program_open[d]) begin
          split(program_row[d]);
          page = index;
        end else if (!writing && out[d] == OUT_REGISTER && held[d][out_plane[d]]) begin
          split(held_row[d * PLANES + out_plane[d]]);
          page = index;
        end
      end
    end
  endtask

  task do_burst;
    begin
      bytes_left = length;
      left = (length + W - 1) / W;
      data_target = d;
      burst_start = b_start;
      spoiled = !powered;
      bad = 0;
      if (powered) begin
        if (d >= DIES) bad = NO_DIE;
        else if (length == 0) bad = EMPTY;
        else if (writing) check_in;
        else check_out;
        if (bad != 0) begin
          report(bad, d, length, 1);
          spoiled = 1;
        end
      end
      if (writing) begin
        word_time = first_word;
        data_end = left != 0 ? NEVER : b_start;
      end else begin
        word_ticks;
        word_time = first_word + ticks;
        data_free = first_word;
        if (left != 0) begin
          taken = length - (left - 1) * W;
          data_free = data_free + t_byte * W * (left - 1) + (t_byte * taken < ONE ? ONE : t_byte * taken);
        end
        if (!SEPARATE_BUS) cycle_free = data_free;
        data_end = data_free;
        if (left != 0 && tracing) begin
          burst_page;
          record(b_start, data_free, d, -1, OUT, page);
        end
      end
    end
  endtask

  task next_word;  // into `word`: what a read burst moves now
    begin
      taken = bytes_left < W ? bytes_left : W;
      bytes_left = bytes_left - taken;
      left = left - 1;
      word_ticks;
      if (left != 0) word_time = word_time + ticks;
      words_moved = words_moved + 1;
      word = ONES;
      d = data_target;
      if (!spoiled) begin
        case (out[d])
          OUT_STATUS, OUT_PLANE_STATUS: begin
            failed = out[d] == OUT_STATUS ? {PLANES{1'b1}} : 1 << status_plane[d];
            c_byte = 8'h80;
            c_byte[6] = !(busy_from[d] <= now && now < busy_until[d]);
            c_byte[5] = c_byte[6] && !(array_start[d] <= now && now < array_end[d]);
            c_byte[1] = before_cached[d] && (before_failed[d] & failed) != 0 && now >= array_start[d];
            c_byte[0] = (array_failed[d] & failed) != 0 && now >= array_end[d];
            word = {W{c_byte}};
          end
          OUT_REGISTER: begin
            n = (d * PLANES + out_plane[d]) * PAGE_WORDS + column[d] / W;
            i = column[d] % W;
            word = registers[n] >> (8 * i);
            if (i != 0 && i + taken > W) word = word | (registers[n + 1] << (8 * (W - i)));
            if (taken != W) word = word | (ONES << (8 * taken));
          end
          OUT_PARAMETERS:
            for (i = 0; i < taken; i = i + 1) word[8 * i +: 8] = parameters[(column[d] + i) & 255];
          OUT_ID:
            for (i = 0; i < taken; i = i + 1) begin
              n = column[d] + i;
              word[8 * i +: 8] = 0;
              if (n < 8 && out_address[d] == 8'h20) word[8 * i +: 8] = 64'h49464E4F >> (8 * n);
              if (n < 8 && out_address[d] == 8'h00) word[8 * i +: 8] = 64'h015441564B >> (8 * n);
            end
          default:
            for (i = 0; i < taken; i = i + 1)
              word[8 * i +: 8] = features[4 * d + feature_index(out_address[d])] >> (8 * (column[d] + i));
        endcase
        if (out[d] != OUT_STATUS && out[d] != OUT_PLANE_STATUS) column[d] = column[d] + taken;
      end
    end
  endtask

  task take_word;
    begin
      c_end = word_time + ONE <= now ? now : word_time;
      taken = bytes_left < W ? bytes_left : W;
      bytes_left = bytes_left - taken;
      left = left - 1;
      word_time = c_end + t_byte * taken;
      words_moved = words_moved + 1;
      d = data_target;
      if (!spoiled && program_open[d]) begin
        n = (d * PLANES + program_plane[d]) * PAGE_WORDS + column[d] / W;
        i = column[d] % W;
        mask = taken == W ? ONES : ~(ONES << (8 * taken));
        if (i == 0) registers[n] = (registers[n] & ~mask) | (write_payload & mask);
        else begin
          pair = {{WORD_BITS{1'b0}}, write_payload & mask} << (8 * i);
          pair_mask = {{WORD_BITS{1'b0}}, mask} << (8 * i);
          registers[n] = (registers[n] & ~pair_mask[WORD_BITS-1:0]) | pair[WORD_BITS-1:0];
          if (i + taken > W) registers[n + 1] = (registers[n + 1] & ~pair_mask[2*WORD_BITS-1:WORD_BITS])
              | pair[2*WORD_BITS-1:WORD_BITS];
        end
        column[d] = column[d] + taken;
      end else if (!spoiled && feature_open[d]) feature_bytes[d] = write_payload[31:0];
      if (left == 0) begin
        c_end = word_time;
        data_free = c_end;
        data_end = c_end;
        if (!SEPARATE_BUS) cycle_free = c_end;
        if (tracing) begin
          burst_page;
          record(burst_start, c_end, d, -1, IN, page);
        end
        if (!spoiled && feature_open[d]) begin
          feature_open[d] = 0;
          if (out_address[d] == 8'h89 && feature_bytes[d][7:0] > RETRY_LEVELS)
            report(LEVEL, d, feature_bytes[d][7:0], 0);
          else features[4 * d + feature_index(out_address[d])] = feature_bytes[d];
          set_busy(c_end + t_wb + t_feat);
          record(busy_from[d], busy_until[d], d, -1, FEATURES, -1);
        end
      end
    end
  endtask

  task drop_burst;
    begin
      left = 0;
      bytes_left = 0;
      word_time = 0;
      data_end = 0;
      writing = 0;
      spoiled = 0;
    end
  endtask

  // ---------------------------------------------------------------- power
  task switch_power;
    begin
      power_next = power_next + 1;
      powered = !powered;
      ready_at = 0;
      if (!powered) begin
        for (d = 0; d < DIES; d = d + 1) begin
          interrupt(now);
          power_up(d);
        end
        spoiled = 1;
      end
    end
  endtask

  task update_ready;  // R/B_n at `after`
    begin
      ready_now = 0;
      ready_at = NEVER;
      for (i = 0; i < DIES; i = i + 1) begin
        if (powered && !(busy_from[i] <= after && after < busy_until[i])) ready_now = ready_now | (1 << i);
        if (after < busy_from[i] && busy_from[i] < ready_at) ready_at = busy_from[i];
        if (after < busy_until[i] && busy_until[i] < ready_at) ready_at = busy_until[i];
      end
    end
  endtask

  // ---------------------------------------------------------------- files
  task read_settings;
    begin
      fault_count = 0;
      power_next = 0;
      power_count = 0;
      bit_error_rate = 0.0;
      retry_error_rate = 0.0;
      seed = 0;
      if (tracing) $fflush(trace_file);
      tracing = 0;
      $sformat(name, "nand%0d.cfg", channel);
      file = $fopen(name, "r");
      if (file == 0) load_errors = load_errors + 1;
      else begin
        got = $fscanf(file, "%s", key);
        while (got == 1) begin
          if (key == "bit_error_rate") got = $fscanf(file, "%f", bit_error_rate);
          else if (key == "retry_error_rate") got = $fscanf(file, "%f", retry_error_rate);
          else if (key == "parameters") for (i = 0; i < 256; i = i + 1) begin
            got = $fscanf(file, "%d", key_value);
            parameters[i] = key_value;
          end else if (key == "fault") begin
            for (i = 0; i < 6; i = i + 1) begin
              got = $fscanf(file, "%d", key_value);
              v[i] = key_value;
            end
            if (fault_count == FAULTS) got = 0;
            else begin
              fault_kind[fault_count] = v[0];
              fault_die[fault_count] = v[1];
              fault_plane[fault_count] = v[2];
              fault_block[fault_count] = v[3];
              fault_page[fault_count] = v[4];
              fault_value[fault_count] = v[5];
              fault_count = fault_count + 1;
            end
          end else if (key == "power") begin
            got = $fscanf(file, "%d", key_value);
            v[0] = key_value;
            got = $fscanf(file, "%d", key_value);
            if (power_count == 2 * CUTS) got = 0;
            else begin
              power_at[power_count] = cycle + v[0];
              power_at[power_count + 1] = cycle + v[0] + key_value;
              power_count = power_count + 2;
            end
          end else begin
            got = $fscanf(file, "%d", y);
            if (key == "seed") seed = y[31:0];
            else if (key == "trace") tracing = y[0];
            else if (key == "t_r") t_r = y;
            else if (key == "t_prog") t_prog = y;
            else if (key == "t_bers") t_bers = y;
            else if (key == "t_dbsy") t_dbsy = y;
            else if (key == "t_rcbsy") t_rcbsy = y;
            else if (key == "t_pcbsy") t_pcbsy = y;
            else if (key == "t_wb") t_wb = y;
            else if (key == "t_rr") t_rr = y;
            else if (key == "t_ccs") t_ccs = y;
            else if (key == "t_adl") t_adl = y;
            else if (key == "t_whr") t_whr = y;
            else if (key == "t_cad") t_cad = y;
            else if (key == "t_pre") t_pre = y;
            else if (key == "t_feat") t_feat = y;
            else if (key == "t_rst") t_rst = y;
            else if (key == "t_rst_idle") t_rst_idle = y;
            else if (key == "t_byte") t_byte = y;
            else got = 0;
          end
          if (got != 1) load_errors = load_errors + 1;
          else got = $fscanf(file, "%s", key);
        end
        $fclose(file);
      end
      random = hash((channel + 1) * 32'h9E3779B1 + seed);
      if (random == 0) random = 1;
      for (i = 0; i < DIES; i = i + 1) operations[i] = 0;
      if (tracing && trace_file == 0) begin
        $sformat(name, "nand%0d.trace", channel);
        trace_file = $fopen(name, "w");
      end
    end
  endtask

  task read_contents;
    begin
      $sformat(name, "nand%0d.bin", channel);
      file = $fopen(name, "rb");
      if (file == 0) load_errors = load_errors + 1;
      else begin
        got = $fread(header, file);
        while (got == 8) begin
          base = -1;
          if (header[63:32] < TOTAL_PAGES && header[31:0] <= PAGE_WORDS && header[31:0] != 0) begin
            index = header[63:32];
            allocate;
          end else load_errors = load_errors + 1;
          if (base < 0) got = 0;
          else begin
            for (w = header[31:0]; w < PAGE_WORDS; w = w + 1) frames[base + w] = ONES;
            got = $fread(frames, file, base, header[31:0]);
            where = index / PAGES;
            if (index % PAGES + 1 > next_page[where]) next_page[where] = index % PAGES + 1;
            if (got != header[31:0] * W) begin
              load_errors = load_errors + 1;
              got = 0;
            end else got = $fread(header, file);
          end
        end
        $fclose(file);
      end
    end
  endtask

  task write_contents;
    begin
      if (trace_file != 0) $fflush(trace_file);
      $sformat(name, "nand%0d.dump", channel);
      file = $fopen(name, "w");
      for (index = 0; index < TOTAL_PAGES; index = index + 1) if (frame_of[index] != 0) begin
        $fwrite(file, "%0d ", index);
        base = (frame_of[index] - 1) * PAGE_WORDS;
        for (w = 0; w < PAGE_WORDS; w = w + 1) $fwrite(file, "%h", frames[base + w]);
        $fwrite(file, "\n");
      end
      $fclose(file);
    end
  endtask

  initial begin
    for (index = 0; index < TOTAL_PAGES; index = index + 1) frame_of[index] = 0;
    for (index = 0; index < TOTAL_BLOCKS; index = index + 1) begin
      next_page[index] = 0;
      erases[index] = 0;
      garbage[index] = 0;
    end
    for (index = 0; index < FRAMES; index = index + 1) free_frames[index] = FRAMES - 1 - index;
    free_count = FRAMES;
    for (index = 0; index < DIES * PLANES * PAGE_WORDS; index = index + 1) registers[index] = ONES;
    for (index = 0; index < DIES * PLANES; index = index + 1) begin
      queued_row[index] = 0;
      held_row[index] = 0;
      read_row[index] = 0;
      array_row[index] = 0;
      before_row[index] = 0;
    end
    for (index = 0; index < 256; index = index + 1) parameters[index] = 0;
    for (d = 0; d < DIES; d = d + 1) begin
      power_up(d);
      operations[d] = 0;
      sequence_start[d] = 0;
      address[d] = 0;
      queued_page[d] = 0;
      feature_bytes[d] = 0;
    end
    // Until `configure`: some pSLC part at 285 MHz.
    t_r = 7125 * ONE;
    t_prog = 57000 * ONE;
    t_bers = 570000 * ONE;
    t_dbsy = 142 * ONE;
    t_rcbsy = 855 * ONE;
    t_pcbsy = 855 * ONE;
    t_wb = 28 * ONE;
    t_rr = 5 * ONE;
    t_ccs = 85 * ONE;
    t_adl = 42 * ONE;
    t_whr = 22 * ONE;
    t_cad = 7 * ONE;
    t_pre = 4 * ONE;
    t_feat = 285 * ONE;
    t_rst = 142500 * ONE;
    t_rst_idle = 1425 * ONE;
    t_byte = ONE / 4;
    seed = 0;
    random = 1;
    bit_error_rate = 0.0;
    retry_error_rate = 0.0;
    tracing = 0;
    fault_count = 0;
    power_next = 0;
    power_count = 0;
    log_file = 0;
    trace_file = 0;
    configured = 0;
    loaded = 0;
    dumped = 0;
    cycle_free = 0;
    data_free = 0;
    data_target = -1;
    burst_start = 0;
    drop_burst;
    ready_at = 0;
    ready_now = 0;
    cycle = 0;
    powered = 1;
    violations = 0;
    load_errors = 0;
    words_moved = 0;
    page_reads = 0;
    page_programs = 0;
    block_erases = 0;
    program_failures = 0;
    erase_failures = 0;
    bit_flips = 0;
    cycles_ready = 0;
    bursts_ready = 0;
    read = 0;
    read_valid = 0;
    write_ready = 0;
    ready = 0;
  end

  always @(posedge clk) begin
    now = {12'd0, cycle, 20'd0};
    after = now + ONE;
    if (configure != configured) begin
      configured = configure;
      read_settings;
    end
    if (load != loaded) begin
      loaded = load;
      read_contents;
    end
    if (dump != dumped) begin
      dumped = dump;
      write_contents;
    end
    if (power_next != power_count) if (cycle >= power_at[power_next]) switch_power;

    if (rst) begin
      drop_burst;
      cycle_free = now;
      data_free = now;
    end else begin
      if (cycles_valid && cycles_ready) begin
        c_start = cycle_free + ONE <= now ? now : cycle_free;
        c_end = c_start + t_cad;
        c_at = c_start < now ? now : c_start;  // rules look at when it was taken
        cycle_free = c_end;
        if (!SEPARATE_BUS) data_free = c_end;
        d = cycles_payload[0 +: TARGET_BITS];
        c_address = cycles_payload[CYCLE_ADDRESS_AT];
        c_byte = cycles_payload[CYCLE_BYTE_AT +: 8];
        do_cycle;
      end
      if (write_valid && write_ready) take_word;
      if (bursts_valid && bursts_ready) begin
        b_start = data_free + ONE <= now ? now : data_free;
        b_at = b_start < now ? now : b_start;
        d = bursts_payload[0 +: TARGET_BITS];
        // One that follows the last burst at once, of the same die and direction, continues it.
        first_word = d == data_target && bursts_payload[BURST_WRITE_AT] == writing && b_start == data_end
                     ? b_start : b_start + t_pre;
        writing = bursts_payload[BURST_WRITE_AT];
        length = bursts_payload[BURST_BYTES_AT +: BURST_BYTES_BITS];
        do_burst;
      end
    end

    if (left != 0 && !writing && word_time <= after) begin
      next_word;
      read <= word;
      read_valid <= 1;
    end else read_valid <= 0;
    if (ready_at <= after) begin
      update_ready;
      ready <= ready_now;
    end
    cycles_ready <= !rst && cycle_free <= after && (SEPARATE_BUS || !(left != 0 && writing));
    bursts_ready <= !rst && data_free <= after && !(left != 0 && writing);
    write_ready <= left != 0 && writing && word_time <= after;
    cycle = cycle + 1;
  end

endmodule
