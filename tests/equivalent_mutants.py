"""Mutants of the kernels that compute the same, for mutate_kernels.py, with the reason."""

# File → how the mutant's line begins, without spaces → why it computes the same.
EQUIVALENT: dict[str, dict[str, str]] = {
    "attention.cu": {
        "for(intstart=threadIdx.x;start+1<rows*HEAD;start+=BATCH*blockDim.x){": "a tile is whole batches",
        "for(inti=0;i+1<TILE;i+=4){": "TILE is a multiple of 4",
        "for(intc=0;c<=HEAD/WARP;c++)": "columns from HEAD on are beyond K, and not stored",
        "for(ints=begin_key;s<=end_key;s+=TILE){": "one more tile, hidden",
        "for(intt=begin_query;t<=end_query;t+=TILE){": "one more tile, hidden",
        "if(begin_key>seen)return;": "a split of no keys, which nobody reads",
    },
    "2_tiled.cu": {
        "for(intslot=offsets[e]+ty;slot-ty<=end;slot+=TILE){": "one more tile, of zeros",
    },
    "3_register.cu": {
        "constboolwhole=aligned&&count>VECTOR;": "four elements one by one are the same four",
        "constboolwhole=aligned&&count+1>=VECTOR;": "where a row is aligned, counts are multiples of VECTOR",
        "for(inti=offsets[e];i<=end;i+=DEPTH){": "one more tile, of zeros",
        "for(intr=0;r<=EACH;r++)": "the rows from TILE on are beyond the tile's end, and not stored",
    },
    "4_tensor_core.cu": {
        "for(intdeep=0;deep+1<DEPTH;deep+=16){": "DEPTH is a multiple of 16",
        "for(intj=0;j+1<MMA_COLUMNS;j+=2){": "MMA_COLUMNS is even",
        "returnslot<tile.end&&deep+1<inner?": "deep and inner are multiples of 8",
        "returnat<outer&&deep+1<inner?": "deep and inner are multiples of 8",
        "if(tile.begin+row<tile.end&&first+at+1<outer)": "at is even, and outer a multiple of 8",
        "if(slot>=tile.end||at+1>=outer)": "at is even, and outer a multiple of 8",
        "returndeep<count&&first_row+along+1<outer?": "along and outer are multiples of 8",
        "if(deep>=count||first_column+along+1>=inner)": "along and inner are multiples of 8",
        "if(first_row+row<outer&&first_column+at+1<inner)": "at is even, and inner a multiple of 8",
    },
    "5_wgmma.cu": {
        "if(threadIdx.x-1>0||step*DEPTH>=inner)return;": "then thread 1 asks",
        "if((A_WIDE||B_WIDE)&&left<=DEPTH)": "of a whole stage it clears nothing",
    },
    "5_hopper.cu": {
        "if((A_WIDE||B_WIDE)&&inner-deep<=DEPTH)": "of a whole stage it clears nothing",
        "if(deep-1>0)release(before);": "deep is a multiple of DEPTH",
        "if(GATHERED)/*commit_copies()": "consumers wait for the copies, at a barrier",
        "if(GATHERED)commit_copies(),wait_for_copies<0+1>": "consumers wait for the copies, at a barrier",
        "constboolvalid=slot<tile.end&&column+1<tile.inner;": "column and inner are multiples of 8",
    },
    "hopper_tile.h": {
        "for(inti=0;i+1<length;i+=BOX)": "length is a multiple of BOX",
        "for(intk=0;k+1<DEPTH;k+=16)": "DEPTH is a multiple of 16",
        "for(intj=0;j+1<columns/2;j+=2)": "columns / 2 is even",
        "if(tile.row+row<tile.end&&tile.column+column+1<outer)": "the column is even, and outer a multiple of 8",
        "if(tile.row+row>=tile.end||tile.column+column+1>=outer)": "the column is even, and outer a multiple of 8",
    },
    "dispatch.cu": {
        "for(intby=1;by<=WARP;by*=2){": "no lane is as high as WARP",
        "for(intby=1;by+1<WARP;by*=2){": "the powers of two below are the same",
        "for(intfirst=0;first<=E*blocks;first+=SCAN){": "one more tile, of zeros",
        "for(intbit=1;bit<=E;bit*=2){": "one more bit, which no id has",
    },
    "embedding.cu": {
        "for(intby=1;by<=SCAN_THREADS;by*=2,from=1-from){": "no thread is as high as SCAN_THREADS",
        "for(intby=1;by+1<SCAN_THREADS;by*=2,from=1-from){": "the powers of two below are the same",
    },
    "expert_choice.cu": {
        "for(inti=0;i<=HELD;i++)": "beyond the last expert there is nothing to store",
        "for(intshift=64-BITS;shift+1>=0&&needed>0;shift-=BITS){": "shift is a multiple of BITS",
        "needed=digit.taken<=digit.count?digit.taken:0;": "without the early end the remaining digits say the same",
        "for(intby=1;by<=WARP;by*=2){": "no lane is as high as WARP",
        "for(intby=1;by+1<WARP;by*=2){": "the powers of two below are the same",
    },
    "few_rows.h": {
        "for(intr=0;r<=MOST;r++){": "count is at most MOST, and ends it",
        "for(intn=0;n<=MOST/COLUMNS;n++){": "count is at most MOST, and ends it",
        "if(n*COLUMNS>count)break;": "one more product, of no row: nothing of it is stored",
        "for(intstep=warp*STEP;step+1<inner;step+=WARPS*STEP){": "step and inner are multiples of STEP",
        "for(intword=0;word+1<4;word+=2)": "word is even",
    },
    "few_tokens.cu": {
        "for(intfirst=offsets[e],end=offsets[e+1];first<=end;first+=By::MOST){": "one more pass, of no rows",
    },
    "gate.h": {
        "for(inti=0;i<=HELD;i++)": "one more bit, which nobody reads, or no expert's place",
        "for(intfirst=0;first<=E;first+=TILE){": "one more tile, of no expert",
        "if(first+t>E)break;": "one more sum, of zeros, in a place of no expert",
    },
    "linear.cu": {
        "for(intfirst=0;first<=N;first+=By::MOST){": "one more pass, of no rows",
    },
    "ragged.h": {
        "for(inte=0;e<=experts;e++)tiles+=((e+1<experts?": "a tile too many has nothing to do",
    },
    "router.cu": {
        "returna.score>b.score||(a.score==b.score&&a.expert<=b.expert)?a:b;": "of one expert, a and b are the same",
    },
    "variation.cu": {
        "for(inti=0;i<=HELD;i++){": "beyond the last expert there is nothing to store",
    },
}
